"""safetensors files: whatever the reference library accepts or refuses, we do too, and read the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import st as files
from builders.st import info
from examples import most
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from safetensors_oracle import DATA, SOUND, agree, one, opened, ours, several, text, theirs
from torch import nn

from ckpt_cli import limits
from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.dtypes import BY_SAFETENSORS
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError, UnknownFormatError
from ckpt_cli.formats import open_checkpoint

ACCEPTED: dict[str, bytes] = {
    "a tensor": one(),
    "no tensors": files.file({}),
    "metadata only": files.file({"__metadata__": {"format": "pt"}}),
    "metadata that is null": files.file({"__metadata__": None, **SOUND}, DATA),
    "metadata that is empty": files.file({"__metadata__": {}, **SOUND}, DATA),
    "metadata after the tensors": files.file({**SOUND, "__metadata__": {"a": "b"}}, DATA),
    "metadata of one key twice": one('{"__metadata__":{"k":"1","k":"2"},' + text("")[1:]),
    "an empty name": files.file({"": SOUND["a"]}, DATA),
    "a name with escapes": one(text("").replace('"a"', r'"\u0041\/\n\ud83d\ude00"')),
    "a name of other scripts": files.file({"名前 é 😀": SOUND["a"]}, DATA),
    "a name with DEL": one(text("").replace('"a"', '"\x7f"')),
    "a name with dots": files.file({".a..b.": SOUND["a"]}, DATA),
    "white space at the end": one(text("") + " \t\r\n "),
    "white space within": one(text("").replace(",", " ,\n").replace(":", "\t:")),
    "an odd length": one(text("") + " "),
    "unknown fields": one(text(',"x":[1,{"y":null}],"z":1e5')),
    "an unknown field twice": one(text(',"x":1,"x":2')),
    "an unknown field that is deep": one(text(',"x":' + "[" * 125 + "]" * 125)),
    "an unknown field of 300 digits": one(text(',"x":' + "9" * 300)),
    "a scalar": files.file({"a": info("F32", [], 0, 4)}, DATA[:4]),
    "sixty-four dimensions": one(shape=[1] * 63 + [4]),
    "no elements": files.file({"a": info("F32", [0, 7], 0, 0)}),
    "no elements before any others": several(0, 3),
    "no elements between others": several(2, 0, 0, 3),
    "no elements of many": files.file({"a": info("F32", [2**62, 0], 0, 0)}),
    "no elements and then too many": files.file({"a": info("F32", [0, 2**63, 2**63], 0, 0)}),
    "any order": several(1, 2, 3, order="t2 t0 t1"),
    "a name twice": one('{"a":{"dtype":"I32","shape":[4],"data_offsets":[0,16]},' + text("")[1:]),
    "a field's name as a tensor's": files.file({"dtype": SOUND["a"]}, DATA),
    "a minus in a name": files.file({"layer-0": SOUND["a"]}, DATA),
    "a begin of 0 at the end": files.file({"a": info("F32", [4], 0, 16), "b": info("U8", [0], 16, 16)}, DATA),
}

REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "a length and nothing": (2).to_bytes(8, "little"),
    "a header of no bytes": bytes(8),
    "only zeros": bytes(100),
    "a header that is cut": files.file(SOUND, length=1000),
    "a length that is too small": files.file(SOUND, DATA, length=20),
    "a length that is one too large": files.file(SOUND, DATA, length=len(json.dumps(SOUND)) + 1),
    "a header of 100 MB": files.file(SOUND, DATA, length=100_000_001),
    "a hole at the beginning": several(1, 2, t0=(4, 8)),
    "a hole in the middle": several(1, 2, t1=(8, 16)),
    "an overlap": several(2, 2, t1=(4, 12)),
    "the same bytes twice": several(2, 2, t1=(0, 8)),
    "bytes at the end": one(data=DATA + b"\0"),
    "bytes after nothing": files.file({}, b"\0"),
    "too few bytes": one(data=DATA[:-1]),
    "offsets beyond the end": several(1, 2, cut=1),
    "offsets backwards": one(data_offsets=[16, 0]),
    "offsets of one": one(data_offsets=[16]),
    "offsets of three": one(data_offsets=[0, 8, 16]),
    "offsets that are negative": one(data_offsets=[-16, 0]),
    "offsets of -0": one(text("").replace("[0,16]", "[-0,16]")),
    "offsets that are floats": one(data_offsets=[0.0, 16.0]),
    "offsets that are text": one(data_offsets=["0", "16"]),
    "offsets beyond 64 bits": one(data_offsets=[0, 2**64]),
    "a size unlike the shape": one(shape=[3]),
    "a shape that is negative": one(shape=[-4]),
    "a shape of -0": one(text("").replace("[4]", "[-0]").replace("16", "0"), b""),
    "a shape of floats": one(shape=[4.0]),
    "a shape of a float with an exponent": one(text("").replace("[4]", "[4e0]")),
    "a shape of bools": one(shape=[True, 4]),
    "a shape of text": one(shape=["4"]),
    "a shape that is null": one(shape=None),
    "a shape that is a number": one(shape=4),
    "a shape that overflows": one(shape=[2**32, 2**32, 2**32]),
    "a shape whose bits overflow": one(shape=[2**62]),
    "a shape beyond 64 bits": one(shape=[2**64]),
    "a shape that overflows before a zero": files.file({"a": info("F32", [2**63, 2**63, 0], 0, 0)}),
    "a dtype that is unknown": one(dtype="F31"),
    "a dtype in small letters": one(dtype="f32"),
    "a dtype of torch": one(dtype="float32"),
    "a dtype that is a number": one(dtype=32),
    "a dtype that is null": one(dtype=None),
    "a field missing": files.file({"a": {"dtype": "F32", "shape": [4]}}, DATA),
    "a field twice": one(text(',"dtype":"F32"')),
    "offsets twice": one(text(',"data_offsets":[0,16]')),
    "a tensor that is null": files.file({"a": None}),
    "a tensor that is text": files.file({"a": "b"}),
    "metadata of numbers": files.file({"__metadata__": {"a": 1}}),
    "metadata of null": files.file({"__metadata__": {"a": None}}),
    "metadata of lists": files.file({"__metadata__": {"a": ["b"]}}),
    "metadata that is a list": files.file({"__metadata__": []}),
    "metadata that is text": files.file({"__metadata__": "a"}),
    "metadata twice": files.file('{"__metadata__":{},"__metadata__":{}}'),
    "padding of zeros": one(text("") + "\0\0"),
    "a byte order mark": files.file(b"\xef\xbb\xbf" + files.encoded(SOUND), DATA),
    "a header that is no UTF-8": files.file(b'{"\xff":1}'),
    "half a surrogate pair": one(text("").replace('"a"', r'"\ud800"')),
    "half a surrogate pair in metadata": files.file(r'{"__metadata__":{"a":"\udc00"}}'),
    "a control character in a name": one(text("").replace('"a"', '"\n"')),
    "a comment": one(text("/**/")),
    "a comma too many": one(text(",")),
    "a form feed": one(text("") + "\f"),
    "a number with a plus": one(text("").replace("4", "+4")),
    "a number with a zero in front": one(text("").replace("4", "04")),
    "two documents": files.file("{}{}"),
    "a list": files.file("[]"),
    "a string": files.file('"a"'),
    "NaN": one(text(',"x":NaN')),
    "infinity": one(text(',"x":-Infinity')),
    "a number out of range": one(text(',"x":1e400')),
    "a number of 400 digits": one(text(',"x":' + "9" * 400)),
    "a number of 400 digits within a field": one(text(',"x":[{"y":-' + "9" * 400 + "}]")),
    "a field that is too deep": one(text(',"x":' + "[" * 126 + "]" * 126)),
    "a field that is far too deep": one(text(',"x":' + '{"y":' * 900 + "1" + "}" * 900)),
    "a torch file": b"PK\3\4" + bytes(60),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_reference_accepts_is_read_as_it_reads_it(name: str, tmp_path: Path) -> None:
    assert agree(tmp_path, ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reference_refuses_is_refused(name: str, tmp_path: Path) -> None:
    assert not agree(tmp_path, REFUSED[name])


STRICTER: dict[str, tuple[bytes, type[CkptError], str]] = {
    "white space in front": (one(" " + text("")), UnknownFormatError, "not a checkpoint"),
    "sixty-five dimensions": (one(shape=[1] * 64 + [4]), MalformedError, "has 65 dimensions; 64 is the most"),
    "a tensor as a list": (files.file({"a": ["F32", [4], [0, 16]]}, DATA), MalformedError, "lacks dtype"),
    "a dtype as a map": (one(dtype={"F32": None}), MalformedError, "which safetensors does not know"),
}
"""What the reference takes although its format's description does not allow it, or nothing can hold it."""


@pytest.mark.parametrize("name", STRICTER)
def test_what_only_a_serde_parser_takes_is_refused(name: str, tmp_path: Path) -> None:
    content, kind, words = STRICTER[name]
    assert theirs(content) is not None
    with pytest.raises(kind, match=words):
        opened(tmp_path, content)


def test_what_a_later_tensor_of_its_name_replaces_may_be_anything(tmp_path: Path) -> None:
    """The one thing that the reference looks at and we do not: it reads the first, and then drops it."""
    content = one('{"a":null,' + text("")[1:])
    assert theirs(content) is None
    assert ours(tmp_path, content) == ours(tmp_path, one())


@pytest.mark.parametrize("dtype", BY_SAFETENSORS)
def test_every_dtype_has_the_width_that_the_reference_gives_it(dtype: str, tmp_path: Path) -> None:
    bits = BY_SAFETENSORS[dtype].bits
    for shape in ([8], [2, 4], [4], [2], [1], [3], [2, 3]):
        numel = shape[0] * (shape[1] if len(shape) > 1 else 1)
        for nbytes in {numel * bits // 8, (numel * bits + 7) // 8, numel * bits // 8 + 1}:
            accepted = agree(tmp_path, files.file({"a": info(dtype, shape, 0, nbytes)}, bytes(nbytes)))
            assert accepted == (numel * bits == 8 * nbytes)


def test_packed_float4_is_counted_as_torch_counts_it(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(torch.float4_e2m1fn_x2)
    path = tmp_path / "float4.safetensors"
    save_file({"x": tensor}, path)
    (mine,) = open_checkpoint(str(path)).tensors
    assert (str(mine.dtype), mine.shape, mine.stride) == ("float4_e2m1fn_x2", (2, 3), (3, 1))
    for shape in ([3, 2, 1], [1, 6, 1]):  # an odd last dimension has no pairs
        (odd,) = opened(tmp_path, files.file({"a": info("F4", shape, 0, 3)}, bytes(3))).tensors
        assert (str(odd.dtype), odd.shape) == ("float4_e2m1fn", tuple(shape))


@settings(max_examples=most(400), deadline=None)
@given(st.sampled_from(sorted(set(ACCEPTED) - {"a name twice"})), st.data())
def test_any_damage_gets_the_reference_s_verdict(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content = bytearray(ACCEPTED[name])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from(b'"{}[],:0149.eE-+ \\unF\n') | st.integers(0, 255))
    if content[8:9] != b"{":  # ours to refuse: see the stricter ones above
        return
    agree(tmp_path_factory.getbasetemp(), bytes(content))


# --- what a checkpoint of it says ------------------------------------------------------------------------------------


def test_entries_keep_the_header_s_order_and_metadata_is_told(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt", "é": "1"}, "b.x": info("U8", [2], 2, 4), "a": info("U8", [2], 0, 2)}
    checkpoint = opened(tmp_path, files.file(header, b"abcd"))
    assert [tensor.name for tensor in checkpoint.tensors] == ["b.x", "a"]
    assert checkpoint.top_level == ["b", "a"]
    assert checkpoint.metadata == header["__metadata__"]
    assert checkpoint.version == f"safetensors, header of {8 + len(json.dumps(header))} bytes"
    assert [values_of(checkpoint, tensor).tolist() for tensor in checkpoint.tensors] == [[99, 100], [97, 98]]


def test_a_tie_that_save_model_noted_is_an_alias(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    path = tmp_path / "tied.safetensors"
    save_model(net, str(path))
    checkpoint = open_checkpoint(str(path))
    with safe_open(path, "pt") as file:
        ((dropped, kept),) = file.metadata().items()
        assert list(file.keys()) == [kept]
    first, second = checkpoint.tensors
    assert (first.name, first.alias_of) == (kept, None)
    assert (second.name, second.alias_of) == (dropped, kept)
    assert first.view == second.view


def test_metadata_that_names_no_tensor_is_no_alias(tmp_path: Path) -> None:
    for metadata in ({"x": "y"}, {"a": "a"}, {"x": "A"}):
        checkpoint = opened(tmp_path, files.file({"__metadata__": metadata, **SOUND}, DATA))
        assert [tensor.name for tensor in checkpoint.tensors] == ["a"]


def test_an_extent_is_where_the_bytes_are(tmp_path: Path) -> None:
    content = several(1, 2, 3, order="t1 t2 t0")
    checkpoint = opened(tmp_path, content)
    begin = 8 + int.from_bytes(content[:8], "little")
    for tensor, offset in zip(checkpoint.tensors, (4, 12, 0), strict=True):
        assert tensor.storage is not None
        assert tensor.storage.extents(0, 1)[0].offset == begin + offset


@settings(max_examples=most(200), deadline=None)
@given(st.binary(max_size=60).map(lambda raw: b"{" + raw))
@example(b'{"a":' + b"[" * 3000)
def test_any_header_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    agree(tmp_path_factory.getbasetemp(), files.file(raw))


@pytest.mark.parametrize(
    ("limit", "most", "build", "words"),
    [
        ("SAFETENSORS_PARSED", 1000, lambda: one(), "would take about"),
        ("NAME_LENGTH", 3, lambda: files.file({"abcd": SOUND["a"]}, DATA), "whose name has 4 characters"),
        ("METADATA", 100, lambda: files.file({"__metadata__": {"a": "b" * 100}}), "__metadata__ of 1 entries"),
    ],
)
def test_a_limit_is_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, most: int, build: Callable[[], bytes], words: str
) -> None:
    assert ours(tmp_path, build()) is not None
    monkeypatch.setattr(limits, limit, most)
    with pytest.raises(LimitError, match=words):
        opened(tmp_path, build())


def test_errors_name_the_tensor_and_the_numbers(tmp_path: Path) -> None:
    for content, kind, words in [
        (several(1, 2, t1=(8, 16)), MalformedError, "a gap before tensor 't1': it begins at byte 8, 4 was due"),
        (several(2, 2, t1=(4, 12)), MalformedError, "an overlap at tensor 't1': it begins at byte 4, 8 was due"),
        (one(data=DATA + b"\0"), MalformedError, "1 bytes follow its last tensor"),
        (one(data=DATA[:-1]), TruncatedError, "its tensors need 16 bytes after the header, the file has 15"),
        (one(shape=[3]), MalformedError, r"F32 \(3,\) takes 12 bytes, its data_offsets 0–16 hold 16"),
        (one(dtype="F31"), MalformedError, "tensor 'a' has dtype 'F31', which safetensors does not know"),
        (
            files.file(SOUND, length=1000),
            TruncatedError,
            "its header should have 1000 bytes, the file has 62 after its length",
        ),
    ]:
        with pytest.raises(kind, match=words):
            opened(tmp_path, content)
