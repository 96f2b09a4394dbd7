"""Pickles in text that stands for bytes, in whatever alphabet, are found; other text never alarms."""

from __future__ import annotations

import base64
import binascii
import pickle
import random
import string
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.pickles import call, pickled
from scanning import HARMFUL, HARMLESS, codes, scanned

from ckpt_cli.budget import ScanBudget
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.scanner.alphabets import runs, whole
from ckpt_cli.scanner.walk import search


def _uuencoded(content: bytes) -> bytes:
    lines = [binascii.b2a_uu(content[at : at + 45]) for at in range(0, len(content), 45)]
    return b"begin 644 x\n" + b"".join(lines) + b" \nend\n"


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "base32": base64.b32encode,
    "base32 in small letters": lambda content: base64.b32encode(content).lower(),
    "base32 of the other alphabet": base64.b32hexencode,
    "base32 without padding": lambda content: base64.b32encode(content).rstrip(b"="),
    "base85": base64.b85encode,
    "ascii85": base64.a85encode,
    "ascii85 as Adobe writes it": lambda content: base64.a85encode(content, adobe=True, wrapcol=60),
    "uuencode": _uuencoded,
    "escapes": lambda content: repr(content).encode(),
    "base85 of zlib": lambda content: base64.b85encode(zlib.compress(content)),
    "base32 of base64": lambda content: base64.b32encode(base64.b64encode(content)),
}
PICKLES = {
    "protocol 2": HARMFUL,
    "protocol 0": b"cos\nsystem\n(S'echo hello'\ntR.",
    "long": pickled([[1] * 200, call("os.system", "echo hi")]),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_text_that_decodes_to_a_pickle_is_found(tmp_path: Path, encoder: str, kind: str) -> None:
    text = ENCODERS[encoder](PICKLES[kind])
    for value in (text, text.decode("latin-1")):
        found = scanned(tmp_path / "m.pkl", pickle.dumps({"a": value}))
        assert {"dangerous-global", "nested-pickle"} <= codes(found)


@pytest.mark.parametrize("encoder", ["base32", "base85", "base85 of zlib"])
def test_a_part_of_a_text_that_decodes_to_a_pickle_is_found(tmp_path: Path, encoder: str) -> None:
    code = b"import base64, pickle; pickle.loads(base64.decode('" + ENCODERS[encoder](HARMFUL) + b"'))"
    assert "dangerous-global" in codes(scanned(tmp_path / "m.pkl", pickle.dumps({"a": code.decode()})))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_text_that_decodes_to_a_harmless_pickle_is_quiet(tmp_path: Path, encoder: str) -> None:
    text = ENCODERS[encoder](pickled({"a": [1] * 40})) + ENCODERS[encoder](HARMLESS)
    assert scanned(tmp_path / "m.pkl", pickle.dumps({"a": text})).findings == []


@pytest.mark.parametrize("length", range(24, 60))
def test_decoders_agree_with_those_of_python(length: int) -> None:
    content = random.Random(length).randbytes(length)
    for encode, how in (
        (base64.b32encode, "base32"),
        (base64.b32hexencode, "base32"),
        (base64.b85encode, "base85"),
        (base64.a85encode, "ascii85"),
    ):
        assert (how, content) in list(whole(encode(content), lambda _: True))
    text = b"see '" + base64.b85encode(content) + b"' and " + base64.b32encode(content)
    found = list(runs(text, lambda _: True))
    assert ("base85", content) in found
    assert ("base32", content) in found


TEXTS = {
    "base64": string.ascii_letters + string.digits + "+/",
    "base32": string.ascii_uppercase + "234567",
    "hex": "0123456789abcdef",
    "base85": "".join(map(chr, range(33, 118))),
    "any": string.printable,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_random_text_never_alarms(kind: str) -> None:
    chance = random.Random(1)
    budget = ScanBudget(opcodes=1 << 30, tries=1 << 30)
    for _ in range(3000):
        text = "".join(chance.choices(TEXTS[kind], k=chance.randrange(24, 200)))
        assert list(search(MemorySource(text.encode()), "0", 1, budget)) == []
