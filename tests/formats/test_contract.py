"""One suite that every format must pass."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from contract import FORMATS, Format, bits, contents
from in_memory import MEMORY
from set_elements import edit, same_states

from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.errors import CkptError, ValueRefusedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.aliasing import tied_names
from ckpt_cli.ops.hash import hash_tensors
from ckpt_cli.ops.show import Shown, show
from ckpt_cli.ops.stats import stats
from ckpt_cli.ops.ties import find_ties, judge

pytestmark = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.label)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """An empty folder, in memory where that is possible: files are damaged thousands of times."""
    with tempfile.TemporaryDirectory(prefix="ckpt-contract-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def path(tmp_path: Path, kind: Format) -> Path:
    """The sample state in the format."""
    path = tmp_path / f"sample{kind.suffix}"
    kind.put(path)
    return path


def test_every_name_is_listed_with_its_dtype_shape_and_stride(kind: Format, path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.format == kind.name
    oracle = kind.read(path)
    tensors = {tensor.name.removeprefix(kind.prefix): tensor for tensor in checkpoint.tensors}
    assert {tensor.name for tensor in checkpoint.tensors} == set(map(kind.named, tensors))
    assert tensors.keys() == oracle.keys() == kind.sample().keys()
    for name, expected in oracle.items():
        assert f"torch.{tensors[name].dtype}" == str(expected.dtype)
        assert tensors[name].shape == tuple(expected.shape)
        if kind.keeps_views:
            assert tensors[name].stride == expected.stride()
            assert tensors[name].storage_offset == expected.storage_offset()
        assert tensors[name].kind == kind.kinds.get(name, "tensor")


def test_every_value_is_what_its_own_library_reads(kind: Format, path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    for name, expected in kind.read(path).items():
        (tensor,) = [tensor for tensor in checkpoint.tensors if tensor.name == kind.named(name)]
        values = torch.from_numpy(values_of(checkpoint, tensor).copy())
        assert torch.equal(values, expected.to(values.dtype)), name


def test_what_values_sum_up_to_and_hash_to_is_what_their_own_library_reads(kind: Format, path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    with ThreadPoolExecutor(2) as executor:
        rows = {row.name: row for row in stats(checkpoint, (), executor).tensors}
        hashes = hash_tensors(checkpoint, "sha256", executor)
    for name, expected in kind.read(path).items():
        numbers = expected.double()
        found = rows[kind.named(name)].moments
        assert found is not None
        assert found.zeros == int((numbers == 0).sum())
        if numbers.numel():
            assert (found.least, found.most) == (numbers.min().item(), numbers.max().item())
            assert found.mean == pytest.approx(numbers.mean().item(), rel=1e-6)
        if numbers.numel() > 1:
            assert found.std == pytest.approx(numbers.std().item(), rel=1e-6)
        pieces = sha256(bits(expected)).digest() if numbers.numel() else b""
        head = json.dumps([str(expected.dtype).removeprefix("torch."), list(expected.shape)]).encode()
        assert hashes.tensors[kind.named(name)] == sha256(head + pieces).hexdigest(), name


def test_its_shards_are_the_files_that_have_tensors(kind: Format, path: Path, ckpt: Ckpt) -> None:
    reported = json.loads(ckpt("info", path, "--json").out)["shards"]
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    assert reported == sum(not each.name.endswith((".json", ".metadata")) for each in files)


def test_ties_are_told_from_equal_tensors_stored_apart(kind: Format, path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    first, second, copy = map(kind.named, ("0.weight", "2.weight", "2.copy"))
    if not kind.keeps_ties:
        assert not tied_names(checkpoint.tensors)
        assert not judge(checkpoint, first, second).tied
        (equal,) = find_ties(checkpoint, equal=True).equal
        assert set(equal.names) == {first, second, copy}
        return
    assert set(tied_names(checkpoint.tensors)) == {first, second}
    assert judge(checkpoint, first, second).tied
    assert judge(checkpoint, first, copy).reason == "not tied: equal values, but stored apart"
    (equal,) = find_ties(checkpoint, equal=True).equal
    assert set(equal.names) in ({first, copy}, {second, copy})


@pytest.mark.parametrize("index", ["0", "-1,1", ":,2", "::-2", "...,1:3", "5:2:-1,::3", "2:2"])
def test_a_slice_shows_what_torch_slices(kind: Format, path: Path, index: str) -> None:
    checkpoint = open_checkpoint(str(path))
    (shown,) = show(checkpoint, [kind.named(f"0.weight[{index}]")])
    assert isinstance(shown, Shown)
    expected = eval(f"array[{index}]", {"array": kind.read(path)["0.weight"].numpy()})
    assert shown.array().shape == expected.shape
    assert (shown.array() == expected).all()


def test_a_prefix_is_the_submodule(kind: Format, path: Path) -> None:
    names = {item.label for item in show(open_checkpoint(str(path)), [kind.named("3")]) if isinstance(item, Shown)}
    assert names == {kind.named(name) for name in kind.sample() if name.startswith("3.")}


def test_set_changes_the_element_its_tied_name_and_nothing_else(kind: Format, path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in kind.read(path).items()}
    done = edit(path, kind.named("2.weight[0,-1]=100"))
    along = {"0.weight"} if kind.keeps_ties else set()
    assert (set(done.changed), set(done.also_changed)) == ({kind.named("2.weight")}, set(map(kind.named, along)))
    for name in ("2.weight", *along):
        before[name][0, -1] = 100
    assert same_states(kind.read(path), before)


def test_several_assignments_are_made_in_order(kind: Format, path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in kind.read(path).items()}
    edit(
        path,
        kind.named("3.scale=[1,2,3,4]"),
        kind.named("3.scale[::2]*=-2"),
        kind.named("3.steps+=1"),
        kind.named("3.mask=true"),
        kind.named("4.columns[:,1]=[9,8,7,6]"),
    )
    before["3.scale"].copy_(torch.tensor([-2, 2, -6, 4]))
    before["3.steps"] += 1
    before["3.mask"].fill_(True)
    before["4.columns"][:, 1] = torch.tensor([9, 8, 7, 6])
    assert same_states(kind.read(path), before)


def test_an_output_gets_the_change_and_the_file_stays(kind: Format, path: Path, tmp_path: Path) -> None:
    old = contents(path)
    out = tmp_path / f"out{kind.suffix}"
    done = edit(path, kind.named("3.scale=0"), output=out)
    assert not done.in_place
    assert contents(path) == old
    assert kind.read(out)["3.scale"].eq(0).all()
    edit(path, kind.named("3.scale=0"))
    assert list(contents(out).values()) == list(contents(path).values())


def test_a_backup_is_the_old_file(kind: Format, path: Path) -> None:
    old = contents(path)
    done = edit(path, kind.named("3.scale=0"), backup=True)
    assert done.backup is not None
    (backup,) = map(Path, done.backups)
    name = backup.name.removesuffix(".bak")
    assert backup.read_bytes() == old[name]
    assert contents(path)[name] != old[name]


def test_a_bad_value_among_good_ones_changes_nothing(kind: Format, path: Path) -> None:
    old = contents(path)
    with pytest.raises(ValueRefusedError):
        edit(path, kind.named("3.scale=0"), kind.named("3.steps=1.5"))
    assert contents(path) == old
    assert os.listdir(path.parent) == [path.name]


def test_setting_what_stands_there_changes_no_byte(kind: Format, path: Path) -> None:
    old = contents(path)
    assert edit(path, kind.named("3.steps=7")).bytes_written == 0
    assert contents(path) == old


def test_there_and_back_again_is_an_involution(kind: Format, path: Path) -> None:
    old = contents(path)
    edit(path, kind.named("0.weight[1]*=-1"), kind.named("3.steps=-5"))
    assert contents(path) != old
    edit(path, kind.named("0.weight[1]*=-1"), kind.named("3.steps=7"))
    assert contents(path) == old


def test_a_file_cut_short_anywhere_is_refused_in_one_line(kind: Format, path: Path) -> None:
    files = _files(path)
    for file in files:
        whole = file.read_bytes()
        for length in _lengths(len(whole), len(files)):
            _put(file, whole[:length])
            with pytest.raises((CkptError, FileNotFoundError)) as refused:
                _read_all(str(path))
            assert "\n" not in str(refused.value)
            if isinstance(refused.value, CkptError):
                assert refused.value.path in (str(path), str(file))
        _put(file, whole)


def _put(file: Path, content: bytes) -> None:
    """Write a file that was not there before: where one is written over, some file systems wait for the disk."""
    file.unlink()
    file.write_bytes(content)


def _files(path: Path) -> list[Path]:
    """The file, or those of the folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _lengths(size: int, files: int) -> list[int]:
    """Every length that is shorter, or of larger files a thousand in all, the shortest and longest among them."""
    if size * files <= 2500:
        return list(range(size))
    ends, between = min(300 // files, size), min(500 // files, size)
    return sorted({*range(ends), *random.Random(size).sample(range(size), between), *range(size - ends, size)})


def test_a_damaged_file_is_refused_or_read(kind: Format, path: Path) -> None:
    generator = random.Random(20)
    refused = 0
    files = _files(path)
    for file in files:
        whole = file.read_bytes()
        for _ in range(max(50, 200 // len(files))):
            data = bytearray(whole)
            for _ in range(generator.randrange(1, 4)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            _put(file, data)
            error = _error_of(str(path))
            refused += error is not None
            assert error is None or error.path in (str(path), *map(str, files))
        _put(file, whole)
    assert refused


def _error_of(path: str) -> CkptError | None:
    try:
        _read_all(path)
    except CkptError as error:
        return error
    return None


def _read_all(path: str) -> None:
    """Open a checkpoint and decode every tensor."""
    checkpoint = open_checkpoint(path)
    try:
        for item in show(checkpoint, []):
            if isinstance(item, Shown):
                item.array()
    finally:
        checkpoint.close()


def test_names_are_listed_without_torch(kind: Format, path: Path) -> None:
    code = "import sys; from ckpt_cli.cli.main import run; run(['ls', sys.argv[1]]); print('torch' in sys.modules)"
    answer = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True).splitlines()
    assert answer[-1] == "False"
    assert {line.split("\t")[0] for line in answer[:-1]} == set(map(kind.named, kind.sample()))
