"""Dtypes of blocks: sizes are those of whole blocks, and what needs single elements is refused in one line."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from block_format import Q4, block_format, write
from conftest import Ckpt

from ckpt_cli.arrays.cast import Losses
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.edits.convert_contents import Casting, pack_plain, pack_whole
from ckpt_cli.errors import MalformedError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Storage, Tensor

__all__ = ["block_format"]

pytestmark = pytest.mark.usefixtures("block_format")

SHAPES = {"fc.weight": (4, 64), "fc.bias": (4,), "out.weight": (2, 32)}


@pytest.fixture
def blocks(here: Path) -> Path:
    """A file of two tensors of blocks and one of float32, in the current folder."""
    return write(here / "m.blk", SHAPES)


def test_sizes_are_those_of_whole_blocks(blocks: Path) -> None:
    tensors = {tensor.name: tensor for tensor in open_checkpoint("m.blk").tensors}
    assert {name: tensor.nbytes for name, tensor in tensors.items()} == {
        "fc.weight": 8 * 18, "fc.bias": 16, "out.weight": 2 * 18,
    }  # fmt: skip
    assert tensors["fc.weight"].span == (0, 144)


def test_a_view_within_a_storage_spans_the_blocks_that_it_touches() -> None:
    storage = Storage("0", 180)
    assert Tensor("a", Q4, (2, 32), (32, 1), storage, 64).span == (36, 72)
    assert Tensor("a", Q4, (2,), (32,), storage, 0).span == (0, 36)
    packed = BY_NAME["float4_e2m1fn"]
    assert Tensor("a", packed, (3,), (1,), storage, 1).span == (0, 2)
    assert Tensor("a", BY_NAME["float6_e2m3fn"], (4, 2), (2, 1), storage, 0).nbytes == 6


def test_ls_info_and_tree_report_true_sizes(blocks: Path, ckpt: Ckpt) -> None:
    listed = json.loads(ckpt("ls", "--json", "m.blk").out)
    rows = listed if isinstance(listed, list) else listed["entries"]
    assert {row["name"]: row["nbytes"] for row in rows} == {"fc.weight": 144, "fc.bias": 16, "out.weight": 36}
    assert all(row["dtype"] == ("float32" if "bias" in row["name"] else "q4_0") for row in rows)
    info = ckpt("info", "m.blk")
    assert info.code == 0
    assert "q4_0" in info.out
    assert "waste" not in info.out
    assert ckpt("tree", "m.blk").code == 0


@pytest.mark.parametrize("command", ["du", "ties"])
def test_other_questions_about_sizes_are_answered(command: str, blocks: Path, ckpt: Ckpt) -> None:
    answer = ckpt(*("ls", "--fold") if command == "du" else (command,), "m.blk")
    assert (answer.code, answer.err) == (0, "")


def refused_in_one_line(ckpt: Ckpt, *arguments: object) -> str:
    answer = ckpt(*arguments)
    assert answer.code == 2, (answer.out, answer.err)
    lines = [line for line in answer.err.splitlines() if not line.startswith(("hint", "  "))]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "arguments",
    [("show", "m.blk", "fc.weight"), ("show", "m.blk", "fc.weight[0]"), ("diff", "m.blk", "m.blk"),
     ("set", "m.blk", "fc.weight=0"), ("set", "m.blk", "fc.weight[0,0]=0"),
     ("show", "m.blk", "fc.weight", "-o", "a.npy")],
)  # fmt: skip
def test_what_needs_values_is_refused_in_one_line(arguments: tuple[str, ...], blocks: Path, ckpt: Ckpt) -> None:
    before = blocks.read_bytes()
    assert "has dtype q4_0, blocks of 32 elements in 18 bytes" in refused_in_one_line(ckpt, *arguments)
    assert blocks.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [("cast", "m.blk", "bfloat16", "fc.weight"), ("cast", "m.blk", "bfloat16"), ("rename", "m.blk", "fc.weight=w"),
     ("rm", "m.blk", "fc.weight"), ("convert", "m.blk", "m.safetensors"), ("convert", "m.blk", "m.pt"),
     ("convert", "m.blk", "m.npz"), ("convert", "--dtype", "float16", "m.blk", "m.pt")],
)  # fmt: skip
def test_edits_that_no_writer_can_carry_out_are_refused(arguments: tuple[str, ...], blocks: Path, ckpt: Ckpt) -> None:
    before = blocks.read_bytes()
    refused_in_one_line(ckpt, *arguments)
    assert blocks.read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["m.blk"]


def test_stats_says_why_there_are_no_numbers(blocks: Path, ckpt: Ckpt) -> None:
    answer = ckpt("stats", "m.blk")
    assert answer.code == 0
    assert answer.out.count("has dtype q4_0, blocks of 32 elements in 18 bytes") == 2


def test_check_says_which_values_it_could_not_check(blocks: Path, ckpt: Ckpt) -> None:
    answer = ckpt("check", "--deep", "--json", "m.blk")
    found = [each for each in json.loads(answer.out)["findings"] if each["code"] == "unchecked"]
    assert [each["where"] for each in found] == ["m.blk: fc.weight", "m.blk: out.weight"]
    assert "blocks of 32 elements in 18 bytes" in found[0]["message"]


def test_the_hash_is_that_of_the_bytes_of_whole_blocks(blocks: Path, ckpt: Ckpt) -> None:
    answer = json.loads(ckpt("hash", "--algorithm", "sha256", "--json", "m.blk").out)
    data = blocks.read_bytes()[-(144 + 16 + 36) :][:144]
    expected = sha256(json.dumps(["q4_0", [4, 64]]).encode() + sha256(data).digest()).hexdigest()
    assert answer["tensors"]["fc.weight"] == expected


def test_the_hash_of_a_view_with_gaps_between_blocks_is_refused(blocks: Path) -> None:
    from ckpt_cli.arrays.codec import as_bytes

    storage = Storage("0", 180)
    with pytest.raises(UnsupportedError, match="blocks of 32 elements in 18 bytes"):
        as_bytes(Tensor("a", Q4, (2, 32), (64, 1), storage))
    with pytest.raises(UnsupportedError):
        as_bytes(Tensor("a", Q4, (32,), (1,), storage, 16))


@pytest.mark.parametrize("shape", [(4, 63), (64, 4), (), (31,)])
def test_rows_that_are_not_whole_blocks_are_refused(shape: tuple[int, ...], here: Path, ckpt: Ckpt) -> None:
    write(here / "m.blk", {"a": shape})
    with pytest.raises(MalformedError, match="are not whole blocks of 32 elements in 18 bytes"):
        Q4.nbytes_of(shape)
    assert "not whole blocks" in refused_in_one_line(ckpt, "ls", "m.blk")


def test_elements_of_blocks_have_no_size_of_their_own() -> None:
    for found in (lambda: Q4.bits, lambda: Q4.itemsize, lambda: BY_NAME["float4_e2m1fn"].itemsize):
        with pytest.raises(UnsupportedError):
            found()


@pytest.mark.parametrize("whole", [False, True])
def test_a_conversion_copies_the_bytes_of_blocks(whole: bool, blocks: Path) -> None:
    checkpoint = open_checkpoint("m.blk")
    casting = Casting(BY_NAME["float16"], Losses())
    tensors = [tensor for tensor in checkpoint.tensors if tensor.dtype is Q4]
    if whole:
        made, contents = pack_whole(checkpoint, tensors, casting)
    else:
        made, contents = pack_plain(checkpoint, tensors, casting, tied=True)
    data = blocks.read_bytes()
    for tensor, old in zip(made, tensors, strict=True):
        assert tensor.dtype is Q4
        assert tensor.storage is not None
        assert old.storage is not None
        content = contents[tensor.storage]
        assert content.extents is not None
        copied = b"".join(data[extent.offset : extent.offset + extent.nbytes] for extent in content.extents)
        assert copied == old.storage.view(0, old.nbytes)
        assert content.nbytes == old.nbytes
