"""Zip files made to harm whoever opens them: sizes and places that lie, names that are there twice, and bombs."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from builders.pickles import pickled, tensor
from builders.pt import DEFLATED, Record, archive, torch_records

Case = tuple[str, Callable[[], bytes], str | None]

_ROOT = {"a": tensor("0", (4,))}


def _records(**options: Any) -> list[Record]:
    return torch_records(_ROOT, {"0": bytes(16)}, **options)


def _changed(name: str, **fields: Any) -> Callable[[], bytes]:
    """A sound file but for some fields of one record."""

    def build() -> bytes:
        records = [replace(r, **fields) if r.name == f"archive/{name}" else r for r in _records()]
        return archive(records)

    return build


def _with(*more: Record, **options: Any) -> Callable[[], bytes]:
    """A sound file with further records, and what its end records say."""
    return lambda: archive([*_records(), *more], **options)


def zeros_deflated(mebibytes: int) -> bytes:
    """So many MiB of zeros as a raw deflate stream, a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + packer.compress(b"") + packer.flush()


def _bomb(name: str, mebibytes: int, said: int) -> Callable[[], bytes]:
    """A record that inflates to so many MiB and is said to have `said` bytes."""
    return lambda: _changed(name, method=DEFLATED, data=zeros_deflated(mebibytes), nbytes=said)()


def _pickle_and_zeros() -> bytes:
    """A sound pickle before 3 GiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = packer.compress(pickled(_ROOT)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + zeros_deflated(3 << 10)


def _many_records() -> bytes:
    return archive([*_records(), *(Record(f"a/{n}") for n in range(190_000))], alignment=1)


_GB = 1 << 30

ZIPS: list[Case] = [
    ("zip_without_records", lambda: archive([], end64=False), "a zip file without records"),
    ("zip_cut_after_its_records", lambda: archive(_records())[:-100], "no end record"),
    ("zip_said_to_have_2**63_records", _with(count=2**63), "a zip of 9223372036854775808 records"),
    ("zip_said_to_have_200_000_records", _with(count=200_000), "ends within one"),
    ("zip_said_to_have_fewer_records", _with(count=2), "its directory of 2 records goes on after the last"),
    ("zip_directory_of_2**40_bytes", _with(directory_size=2**40), "with a directory of 1099511627776 bytes"),
    ("zip_directory_beyond_the_end", _with(directory_offset=2**40), "it must end by"),
    ("zip_directory_elsewhere", _with(directory_offset=0), "its directory has no record at byte 0"),
    ("zip64_end_elsewhere", lambda: _patched(b"PK\6\7", 8, (2**62).to_bytes(8, "little")), "beyond its own locator"),
    ("zip64_end_that_is_none", lambda: _patched(b"PK\6\7", 8, bytes(8)), "not where its locator says"),
    ("zip_of_many_disks", lambda: _patched(b"PK\5\6", 4, b"\1\0"), "spans several disks"),
    ("zip_said_to_have_251_000_records", _with(count=251_000), "a zip of 251000 records"),
    ("zip_of_190_000_records", _many_records, None),
    ("zip_record_twice", _with(Record("archive/data/0", b"\1" * 16)), "two records called 'archive/data/0'"),
    ("zip_pickle_twice", _with(Record("archive/data.pkl", pickled({}))), "two records called 'archive/data.pkl'"),
    ("zip_encrypted", _changed("data/0", flags=0x809), "is encrypted"),
    ("zip_of_method_12", _changed("data/0", method=12), "method 12"),
    ("zip_stored_unlike_its_size", _changed("data/0", nbytes=_GB), "stored as 16 bytes but said to hold 1073741824"),
    ("zip_record_beyond_the_next", _changed("data/0", stored=_GB, nbytes=_GB), "reaches to byte"),
    ("zip_record_into_the_next", _changed("data/0", stored=64, nbytes=64), None),
    ("zip_records_at_one_place", _changed("data/0", header=0), "reaches to byte"),
    ("zip_record_at_the_end", _changed("data/0", header=2**31), "reaches to byte"),
    ("zip_record_in_the_directory", _with(Record("archive/data/1", header=1 << 20)), "reaches to byte"),
    ("zip64_sizes_that_lie", _changed("data/0", zip64=True, nbytes=2**62, stored=2**62), "reaches to byte"),
    ("zip64_sizes_that_lack", _changed("data/0", nbytes=0xFFFFFFFF, stored=0xFFFFFFFF), "lacks the zip64 sizes"),
    ("zip_pickle_called_otherwise", _changed("data.pkl", local_name="archive/data.pkk"), "in its local header"),
    ("zip_pickle_compressed_otherwise", _changed("data.pkl", local_method=DEFLATED), "another local header"),
    ("zip_names_that_climb", _with(Record("../../etc/passwd", b"x"), Record("/etc/passwd", b"x")), None),
    ("zip_names_that_are_no_text", _with(Record(b"archive/\xff\xfe\0\x1b[2J", b"x")), None),
    ("zip_name_of_64_kb", _with(Record("archive/" + "a" * 60_000, b"x")), None),
    ("zip_without_pickle", lambda: archive(_records()[1:]), "it has no archive/data.pkl"),
    ("zip_without_prefix", lambda: archive([Record("data.pkl", pickled(_ROOT))]), "it has no data.pkl"),
    ("zip_without_storage", lambda: archive([r for r in _records() if r.name != "archive/data/0"]), "no record"),
    ("zip_byteorder_of_neither", lambda: archive(_records(byteorder=b"\x1b[2Jmiddle")), "its byteorder record says"),
    ("zip_comment_with_an_end_record", lambda: archive(_records(), comment=b"PK\5\6" + bytes(18) + b"x"),
     "a zip file without records"),
    ("bomb_of_3_gib", _bomb("data.pkl", 3 << 10, 3 << 30), "would inflate to 3221225472 bytes"),
    ("bomb_that_says_100_bytes", _bomb("data.pkl", 3 << 10, 100), "opcode"),
    ("bomb_after_a_pickle", lambda: _changed("data.pkl", method=DEFLATED, data=_pickle_and_zeros(), nbytes=_GB)(),
     "would inflate to"),
    ("bomb_in_byteorder", _bomb("byteorder", 3 << 10, 6), "its byteorder record says"),
    ("bomb_in_byteorder_said_so", _bomb("byteorder", 1 << 10, _GB), "its byteorder record has 1073741824 bytes"),
    ("bomb_in_version", _bomb("version", 1 << 10, _GB), "its version record has 1073741824 bytes"),
    ("bomb_in_a_storage", _bomb("data/0", 3 << 10, 3 << 30), None),
    ("deflated_pickle_that_ends_early", _changed("data.pkl", method=DEFLATED, nbytes=1 << 20), "inflates to"),
    ("deflated_pickle_that_is_none", _changed("data.pkl", method=DEFLATED, data=b"\xff" * 100), "does not inflate"),
]  # fmt: skip
"""Name, file, and a part of the error or None where it may open."""


def _patched(signature: bytes, offset: int, new: bytes) -> bytes:
    """A sound file with some bytes changed after the last place where a signature stands."""
    content = bytearray(archive(_records()))
    at = content.rindex(signature) + offset
    content[at : at + len(new)] = new
    return bytes(content)
