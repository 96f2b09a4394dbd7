"""Any header of a safetensors file gets the verdict of the reference library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import st as files
from builders.st import floats
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from safetensors_oracle import agree, ours

from ckpt_cli import limits
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.safetensors import header

NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 16, 24, 2**32, 2**63, 2**64 - 1, 2**64, -1, 1.0, True, None, "4", "-0"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from(["F32", "I64", "U8", "BOOL", "F4", "F6_E2M3", "f32", "", None, 1, ["F32"]]),
    "shape": st.lists(NUMBERS, max_size=4) | st.sampled_from([None, "", 4, {}]),
    "data_offsets": st.lists(NUMBERS, max_size=3) | st.sampled_from([None, "", 4]),
    "extra": st.recursive(st.none() | st.integers() | st.text(max_size=2), lambda inner: st.lists(inner, max_size=2)),
}


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A sound file, a few things of which were changed."""
    header, data = floats(*draw(st.lists(st.integers(0, 4), max_size=4)))
    if draw(st.booleans()):
        header = {name: header[name] for name in draw(st.permutations(sorted(header)))}
    for _ in range(draw(st.integers(0, 3))):
        if header:
            target = header[draw(st.sampled_from(sorted(header)))]
            field = draw(st.sampled_from(sorted(FIELDS)))
            if draw(st.booleans()):
                target.pop(field, None)
            else:
                target[field] = draw(FIELDS[field])
    if draw(st.booleans()):
        strings = st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.none())
        metadata = {"__metadata__": draw(st.none() | strings)}
        header = {**metadata, **header} if draw(st.booleans()) else {**header, **metadata}
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), separators=separators)
    raw = text.encode("utf-8", "surrogatepass").replace(b'"-0"', b"-0")
    padding = draw(st.sampled_from([b"", b" ", b"\n", b"\0"]))
    more = draw(st.integers(-1, 1))
    return files.file(raw + padding, data[:more] if more < 0 else data + bytes(more))


@settings(max_examples=most(500), deadline=None)
@given(headers())
def test_any_header_gets_the_reference_s_verdict(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    agree(tmp_path_factory.getbasetemp(), content)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "a": 'tie: "b" \u00e9'}])
@pytest.mark.parametrize("padding", [b"", b"   ", b"\n\t"])
def test_a_long_header_as_writers_write_it_needs_no_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], padding: bytes
) -> None:
    names = ["", "a.b", "é", "a b", "\x7f", *map(str, range(3000))]
    sizes = [[], [4], [0, 2], [2, 1, 3]]
    tensors = {name: torch.zeros(sizes[number % 4], dtype=torch.int16) for number, name in enumerate(names)}
    raw = save(tensors, metadata)
    length = int.from_bytes(raw[:8], "little")
    content = files.file(raw[8 : 8 + length].rstrip() + padding, raw[8 + length :])
    monkeypatch.setattr(header, "_json", None)
    (tmp_path / "a.safetensors").write_bytes(content)
    checkpoint = open_checkpoint(str(tmp_path / "a.safetensors"))
    assert {tensor.name: tensor.shape for tensor in checkpoint.tensors} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert checkpoint.metadata == metadata
    checkpoint.close()


PLAIN = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
CHANGES = [
    (b'"a"', b'"b"'),  # a name that is there twice
    (b'"a"', b'"\\u0061"'),
    (b'"a"', b'"a\n"'),
    (b'"a"', b'"\xff"'),
    (b'"a"', b'"__metadata__"'),
    (b'"a"', b'"b","a"'),
    (b'"U8"', b'"U9"'),
    (b'"U8"', b'"U\\u0038"'),
    (b"[2]", b"[02]"),
    (b"[2]", b"[2,]"),
    (b"[2]", b"[,2]"),
    (b"[2]", b"[1,2]"),
    (b"[2]", b"[]"),
    (b"[2]", "[٢]".encode()),
    (b"[0,2]", b"[0,02]"),
    (b"[0,2]", b"[00,2]"),
    (b"[0,2]", b"[1,2]"),
    (b"[0,2]", b"[0,3]"),
    (b"[0,2]", b"[0,18446744073709551618]"),
    (b"[0,2]", b"[2,4]"),
    (b"[0,2]", b"[0,-2]"),
    (b"]},", b"]}"),
    (b"]},", b"]}},"),
    (b"]},", b"]} ,"),
    (b"]},", b"]},,"),
    (b"]},", b'],"c":1},'),
    (b"]}}", b"]},}"),
    (b"]}}", b"]}"),
    (b"]}}", b"]}}}"),
    (b"]}}", b"]}}x"),
    (b"]}}", b']},"__metadata__":{"c":"d"}}'),
    (b'{"a"', b'{"__metadata__":{"c":"d","c":"e"},"a"'),
    (b'{"a"', b'{"__metadata__":{"c":1},"a"'),
    (b'{"a"', b'{"__metadata__":{"c":"d"}"a"'),
    (b'{"a"', b'{"__metadata__":{"c":"d"},,"a"'),
    (b'{"a"', b'{"__metadata__":null,"a"'),
    (b'{"a"', b'{"__metadata__":{},"__metadata__":{},"a"'),
    (b'{"a"', b'{,"a"'),
    (PLAIN, b"{"),
    (PLAIN, b"{}"),
    (PLAIN, b'{"__metadata__":{}}'),
    (PLAIN, b'{"__metadata__":{}'),
    (PLAIN, b'{"__metadata__":{},'),
    (b'{"a"', b'{ "a"'),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_header_that_is_almost_plain_gets_the_reference_s_verdict(tmp_path: Path, old: bytes, new: bytes) -> None:
    assert old in PLAIN
    agree(tmp_path, files.file(PLAIN.replace(old, new, 1), bytes(4)))


def test_a_name_without_end_is_refused_in_a_plain_header_too(tmp_path: Path) -> None:
    name = b'"' + b"a" * (limits.NAME_LENGTH + 1) + b'"'
    assert ours(tmp_path, files.file(PLAIN.replace(b'"a"', name, 1), bytes(4))) is None
