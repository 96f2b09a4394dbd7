"""The reader of pickles imports nothing, meets its limits, leaves long text in the file and says where it stopped."""

from __future__ import annotations

import gc
import pickle
import struct
import sys

import pytest
from builders.pickles import call, pickled, value

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError
from ckpt_cli.pickles.graph import ByteArray, Call, Global, Inline, Located
from ckpt_cli.pickles.read import read_pickle


@pytest.mark.parametrize(
    ("code", "kind"), [(b"X", "str"), (b"B", "bytes"), (b"T", "raw")], ids=["text", "bytes", "string"]
)
def test_a_long_string_stays_in_the_file(code: bytes, kind: str) -> None:
    long = limits.INLINE_BYTES + 1
    root = read_pickle(b"(" + code + struct.pack("<I", long) + b"a" * long + b"Nt.").root
    assert isinstance(root, tuple)
    inline = root[0]
    assert isinstance(inline, Inline)
    assert (inline.kind, inline.offset, inline.nbytes) == (kind, 6, long)
    assert root[1] is None


@pytest.mark.parametrize(
    ("limit", "most", "data", "words"),
    [
        ("PICKLE_OPCODES", 1000, b"N0" * 9000 + b"N.", "has more than 1000 opcodes"),
        ("PICKLE_BLOCKS", 1000, b"(" + b"]" * 20_000 + b"l.", "builds far more objects than a checkpoint needs"),
        ("PICKLE_TEXT", 1000, value("a" * 256) * 4 + b".", "holds more than 1000 bytes of text"),
        ("PICKLE_TEXT", 1000, value("é" * 100) * 3 + b".", "holds more than 1000 bytes of text"),
        ("PICKLE_TEXT", 1000, value(b"a" * 256) * 4 + b".", "holds more than 1000 bytes of text"),
        ("PICKLE_LINES", 3, b"I1\n" * 4 + b".", "has more than 3 lines"),
        ("INLINE_BYTES", 10, b"\x8b\x0b\0\0\0" + b"a" * 11 + b".", "has an integer of 11 bytes"),
        ("INLINE_BYTES", 300, b"I" + b"1" * 400 + b"\n.", "has a line of over 300 bytes"),
    ],
)
def test_a_limit_is_met(monkeypatch: pytest.MonkeyPatch, limit: str, most: int, data: bytes, words: str) -> None:
    gc.collect()  # or else blocks that are freed meanwhile make room for others
    monkeypatch.setattr(limits, limit, most)
    with pytest.raises(LimitError, match=words) as refused:
        read_pickle(data)
    assert "CKPT_LIMITS" in (refused.value.hint or "")


def test_short_ascii_text_meets_no_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICKLE_TEXT", 1000)
    root = read_pickle(b"(" + value("a" * 64) * 100 + b"l.").root
    assert root == ["a" * 64] * 100


def test_an_error_says_which_opcode_and_where() -> None:
    for data, words in [
        (b"\x80\2K\1\x85R.", r"the pickle finds too little on its stack \(opcode b'R' at byte 5\)"),
        (b"\x80\2J\1\2.", r"the pickle ends within an argument \(opcode b'J' at byte 2\)"),
        (b"\x80\2h\5.", r"the pickle asks for memo 5, which it never put \(opcode b'h' at byte 2\)"),
        (b"Ihello\n.", r"the pickle has a bad argument \(opcode b'I' at byte 0\): invalid literal for int"),
        (b"S'a\n.", r"the pickle has a string without quotes \(opcode b'S' at byte 0\)"),
        (b"\x80\6N.", r"the pickle says protocol 6, while 5 is the newest, \(opcode b'\\x80' at byte 0\)"),
        (b"\x80\2N", r"the pickle ends before its STOP opcode"),
        (b"(N.", r"the pickle stops in the middle of a value"),
    ]:
        with pytest.raises((MalformedError, TruncatedError), match=words):
            read_pickle(data)


def test_memo_that_is_counted_and_numbered_at_once_is_refused() -> None:
    with pytest.raises(MalformedError, match="both counts and numbers its memo"):
        read_pickle(b"Nq\7\x94.")


def test_nothing_that_a_pickle_names_is_imported() -> None:
    before = set(sys.modules)
    graph = read_pickle(pickled([call("antigravity.open"), call("this.is.a.module", 1)]))
    assert set(sys.modules) == before
    assert [node.qualified for node in graph.globals] == ["antigravity.open", "this.is.a.module"]
    assert isinstance(graph.root, list)
    assert all(isinstance(node, Call) and isinstance(node.func, Global) for node in graph.root)


def test_a_long_line_of_text_stays_in_the_file() -> None:
    long = "a" * limits.INLINE_BYTES
    for data in (pickle.dumps([long, "b"], 0), memoryview(pickle.dumps([long, "b"], 0))):
        root = read_pickle(data).root
        assert isinstance(root, list)
        inline, after = root
        assert isinstance(inline, Inline)
        assert (inline.kind, bytes(data[inline.offset : inline.offset + inline.nbytes])) == ("escaped", long.encode())
        assert after == "b"
    with pytest.raises(TruncatedError, match="ends within a line"):
        read_pickle(b"V" + long.encode())


def test_bytes_and_strings_of_python_2_know_where_they_stand() -> None:
    data = pickle.dumps([b"abc", bytearray(b"de")], 5) + b""
    root = read_pickle(data).root
    assert isinstance(root, list)
    located, array = root
    assert isinstance(located, Located)
    assert isinstance(array, ByteArray)
    assert isinstance(array.data, Located)
    assert data[located.offset :][:3] == b"abc"
    assert data[array.data.offset :][:2] == b"de"
    (raw,) = read_pickle(b"(U\2hit.").root  # type: ignore[misc]
    assert (raw.raw, raw.offset) == (b"hi", 3)
