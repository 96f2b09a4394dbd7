"""No way of calling a name goes unseen by `ckpt scan`: evasions, memos, cyclic values, limits."""

from __future__ import annotations

import base64
import bz2
import gzip
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from builders.pickles import Ops, built, call, get, named, new, persistent, pickled, put, value
from scanning import HARMFUL, codes, scanned

from ckpt_cli import limits

PROTOCOL0 = b"(S'raise RuntimeError(\"hi\")'\ni__builtin__\nexec\n."
SOUR = (
    b"c__builtin__\nglobals\n(tRp100\n0c__builtin__\ncompile\n(S'x=1'\nS''\nS'exec'\ntRp101\n0c__builtin__\neval\n"
    b"(g101\ng100\ntRp102\n0c__builtin__\ngetattr\n(c__builtin__\ndict\nS'get'\ntRp103\n0c__builtin__\napply\n"
    b"(g103\n(g100\nS'x'\nltRp104\n0g104\n."
)
MEMO = b"Vos\np2\n0Vsystem\np3\n0Vtorch\np0\n0VLongStorage\np1\n0g2\ng3\n\x93(Vcat flag.txt\ntR."
"""Names that only the memo knows."""
NO_CALL = b"\x80\x04cos\nsystem\n."


def _tar(content: bytes) -> bytes:
    member = tarfile.TarInfo("a")
    member.size = len(content)
    return member.tobuf() + content + bytes(-len(content) % 512 + 1024)


def _objects(content: bytes) -> bytes:
    """An array of objects in numpy's own format."""
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + content


EVASIONS: dict[str, bytes] = {
    "inst": PROTOCOL0,
    "sour-pickles": SOUR,
    "memo": MEMO,
    "memo-and-junk": MEMO + b"\n\n\t\t",
    "obj": b"(cos\nsystem\nVid\no.",
    "obj-dropped": b"(cos\nsystem\nVid\no0N.",
    "newobj": pickled(new("subprocess.Popen", "id")),
    "reduce-dropped": pickled(Ops(call("os.system", "id") + b"0N")),
    "name-only": NO_CALL,
    "breaks-after": b"\x80\x02cos\nsystem\nX\2\0\0\0id\x85R\xff",
    "ends-after": b"\x80\x02cos\nsystem\nX\2\0\0\0id\x85R",
    "missing-memo": b"\x80\x04cos\nsystem\n\x8c\x02os\x94h\x03h\x00\x93X\2\0\0\0id\x85R.",
    "name-is-a-number": b"\x80\x04cos\nsystem\nK\x2a\x94\x8c\x02os\x94h\x00h\x01\x93.",
    "computed-name": b"\x80\x04cbuiltins\nstr\nX\2\0\0\0os\x85R\x8c\x06system\x93X\2\0\0\0id\x85R.",
    "binary-strings": b"U\x02osU\x06system\x93U\x02ls\x85R.",
    "leading-zero-integer": b"I010\n0cos\nsystem\n(VidtR.",
    "mark-left-open": b"\x80\x02(cos\nsystem\nX\2\0\0\0id\x85R.",
    "values-left": b"\x80\x02NNcos\nsystem\nX\2\0\0\0id\x85R.",
    "protocol-9": b"\x80\x09cos\nsystem\nX\2\0\0\0id\x85R.",
    "mixed-memo": b"\x80\x04Np9\n0\x8c\x02os\x94\x8c\x06system\x94\x93X\2\0\0\0id\x85R.",
    "second-stream": pickle.dumps(["a", "b"]) + HARMFUL,
    "second-stream-protocol-0": pickle.dumps(["a"]) + b"cos\nsystem\n(Vid\ntR.",
    "after-junk": pickle.dumps(["a"]) + b"junk" * 5 + HARMFUL,
    "nested-bytes": pickled(call("pickle.loads", HARMFUL)),
    "nested-unloaded": pickled({"x": HARMFUL}),
    "nested-twice": pickled({"x": pickled([HARMFUL])}),
    "nested-latin": pickled({"x": call("_codecs.encode", HARMFUL.decode("latin-1"), "latin1")}),
    "nested-long": pickled({"x": pickled(["y" * 100_000, call("os.system", "id")])}),
    "nested-load": pickled(call("torch.storage._load_from_bytes", HARMFUL)),
    "nested-load-of-junk": pickled(call("torch.storage._load_from_bytes", b"junk")),
    "getattr-chain": pickled(call("builtins.getattr", call("builtins.__import__", "os"), "system")),
    "getattr-of-module": pickled(call(call("builtins.getattr", named("torch.storage"), "os"), "x")),
    "getattr-computed": pickled(call("builtins.getattr", call("lab.f"), "system")),
    "getattr-handed-on": pickled(call("lab.apply", named("builtins.getattr"), "x")),
    "getattr-dunder": pickled(call("builtins.getattr", named("lab.Net"), "__globals__")),
    "getattr-dotted": pickled(call("builtins.getattr", named("lab.Net"), "a.b")),
    "partial-of-load": pickled(call(call("functools.partial", named("torch.load"), "x"))),
    "partial-of-getattr": pickled(call("functools.partial", named("builtins.getattr"), named("lab.Net"))),
    "partial-called": pickled(call(call("functools.partial", named("lab.f")))),
    "partial-by-state": pickled(built(call("functools.partial", named("lab.f")), (call("lab.g"), (), {}, None))),
    "extension": pickled(Ops(b"\x82\x07" + value(()) + b"R")),
    "class-patched": pickled(built(named("torch.nn.Linear"), {"forward": named("lab.f")})),
    "items-of-a-module": pickled(Ops(named("lab.registry") + b"(X\1\0\0\0aK\1u")),
    "attribute-patched": pickled(built(call("builtins.getattr", named("lab.Net"), "inner"), {"a": 1})),
    "persistent-id": pickled(persistent(("storage", named("os.system"), "0", "cpu", 1))),
    "call-of-a-call": pickled(call(call("lab.f"), "x")),
    "build-in-rebuild": pickled(
        call("torch._tensor._rebuild_from_type_v2", named("os.system"), named("lab.T"), ("id",), None)
    ),
    "base32": pickled({"x": base64.b32encode(HARMFUL).decode()}),
    "base85": pickled({"x": base64.b85encode(HARMFUL).decode()}),
    "ascii85": pickled({"x": base64.a85encode(HARMFUL).decode()}),
    "escapes": pickled({"x": repr(HARMFUL)}),
    "gzip": gzip.compress(HARMFUL),
    "bzip2": bz2.compress(HARMFUL),
    "zlib": zlib.compress(HARMFUL),
    "sorted-by": pickled(
        Ops(named("builtins.sorted") + value((["id"],)) + value({"key": named("os.system")}) + b"\x92")
    ),
    "tar-in-a-string": pickled({"x": _tar(HARMFUL)}),
    "objects-in-a-string": pickled({"x": _objects(HARMFUL)}),
    "7z": b"7z\xbc\xaf\x27\x1c" + bytes(30),
    "zstandard": b"\x28\xb5\x2f\xfd" + bytes(30),
    "magic-by-eval": pickled(call("builtins.eval", "0x1950A86A20F9469CFC6C")) + HARMFUL,
    "hdf5-lambda": b"\x89HDF\r\n\x1a\n" + bytes(50) + b'{"class_name": "Lambda", "config": {}}',
}


@pytest.mark.parametrize("name", EVASIONS)
def test_no_evasion_goes_unseen(tmp_path: Path, name: str) -> None:
    found = scanned(tmp_path / "m.pkl", EVASIONS[name])
    assert not found.ok
    assert codes(found)


@pytest.mark.parametrize("name", [name for name in EVASIONS if EVASIONS[name].find(b"cos\nsystem\n") >= 0])
def test_os_system_is_named_wherever_it_hides(tmp_path: Path, name: str) -> None:
    found = scanned(tmp_path / "m.pkl", EVASIONS[name])
    assert any(f.severity == "error" and "os.system" in f.message for f in found.findings)


def test_the_call_is_told(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.pkl", HARMFUL)
    assert found.findings[0].message == "os.system('echo hi'): os runs commands or talks to the system"


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_pickle_beyond_the_limits_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICKLE_LINES", 10)
    assert codes(scanned(tmp_path / "m.pkl", b"\x80\x02" + b"I1\n0" * 20 + b"N.")) == {"limit"}


def test_more_strings_than_are_searched_are_told(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.pkl", pickled([b"\x80\x02"] * 20_001 + [HARMFUL]))
    assert codes(found) == {"not-searched"}


def test_a_long_string_that_is_no_text_is_searched_all_the_same(tmp_path: Path) -> None:
    raw = b"\xff" * (limits.INLINE_BYTES + 1)
    found = scanned(tmp_path / "m.pkl", b"\x80\x02X" + struct.pack("<I", len(raw)) + raw + b".")
    assert found.ok


def test_shared_and_cyclic_values_are_told_without_end(tmp_path: Path) -> None:
    cyclic = Ops(put(0, []) + get(0) + b"a" + b"(" + b"j\0\0\0\0" * 50 + b"e")
    found = scanned(tmp_path / "m.pkl", pickled(call("os.system", cyclic)))
    assert len(found.findings[0].message) < 2000


def test_a_pickle_that_stops_within_a_frame_is_broken_because_some_readers_skip_the_rest(tmp_path: Path) -> None:
    whole = b"N." + b"\0" * 40
    content = b"\x80\x04\x95" + struct.pack("<Q", len(whole)) + whole
    assert "broken-pickle" in codes(scanned(tmp_path / "m.pkl", content))
    assert scanned(tmp_path / "clean.pkl", pickle.dumps(list(range(100_000)), 4)).ok


_SAYS_TWO_THINGS = "U\u00c4" + "a" * 128 + "0cos\nsystem\n(Vid\ntR."
"""In Latin-1 a string of 196 bytes, in other encodings one of 128, after which a call follows."""


@pytest.mark.parametrize("encoding", ["mac_roman", "cp437", "latin1\0", 5])
def test_bytes_that_are_loaded_must_be_encoded_as_latin_1(tmp_path: Path, encoding: object) -> None:
    text = _SAYS_TWO_THINGS.ljust(198, "b") + "."
    loads = pickled(call("torch.storage._load_from_bytes", call("_codecs.encode", text, encoding)))
    assert "dangerous-global" in codes(scanned(tmp_path / "m.pkl", loads))
    harmless = text.replace("cos\nsystem", "xos\nsystem")
    as_usual = pickled(call("torch.storage._load_from_bytes", call("_codecs.encode", harmless, "latin1")))
    assert scanned(tmp_path / "usual.pkl", as_usual).ok


def test_bytes_that_are_loaded_are_no_string_of_python_2_that_each_loader_decodes_otherwise(tmp_path: Path) -> None:
    raw = _SAYS_TWO_THINGS.encode().ljust(198, b"b") + b"."
    text = Ops(b"T" + struct.pack("<i", len(raw)) + raw)
    loads = pickled(call("torch.storage._load_from_bytes", call("_codecs.encode", text, "latin1")))
    assert "dangerous-global" in codes(scanned(tmp_path / "m.pkl", loads))


def test_a_long_line_of_text_is_looked_at_with_its_escapes_undone(tmp_path: Path) -> None:
    """As it stands it is a string that covers the rest; what is loaded calls a name behind a shorter one."""
    nbytes = limits.INLINE_BYTES + 100
    short = "X\\u00" + f"{9:02x}" + "\0\0\0" + "a" * 9 + "0cos\\u000asystem\\u000a(Vid\\u000atR."
    text = Ops(b"V" + short.encode() + b"b" * nbytes + b"\n")
    loads = pickled(call("torch.storage._load_from_bytes", call("_codecs.encode", text, "latin1")))
    found = scanned(tmp_path / "m.pkl", loads)
    assert "os.system" in {named.name for named in found.globals}
