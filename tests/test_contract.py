"""One suite that every format must pass."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import FORMATS, Format, State, sample

from ckpt_cli.arrays.codec import values_of
from ckpt_cli.errors import CkptError, ValueRefusedError
from ckpt_cli.files.overlay import Overlay
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model import Checkpoint
from ckpt_cli.ops.assign import Changes, assign
from ckpt_cli.ops.edit import Edit, edit_values
from ckpt_cli.ops.shared import tied_names
from ckpt_cli.ops.ties import find_ties, judge
from ckpt_cli.ops.values import Shown, show

pytestmark = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)


@pytest.fixture
def path(tmp_path: Path, kind: Format) -> Path:
    """The sample state in the format."""
    path = tmp_path / f"sample{kind.suffix}"
    kind.write(sample(), path)
    return path


def edit(path: Path, *assignments: str, output: Path | None = None, backup: bool = False) -> Edit:
    """What `ckpt set` does."""

    def plan(checkpoint: Checkpoint, overlay: Overlay) -> Changes:
        return assign(checkpoint, overlay, assignments)

    return edit_values(str(path), plan, output=None if output is None else str(output), backup=backup)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bytes in row-major order."""
    flat = tensor.flatten().contiguous()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # a lone element may keep any stride


def same_states(a: State, b: State) -> bool:
    """Whether two states are equal name by name, NaN and sign of zero included."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(bytes_of(a[name]), bytes_of(b[name]))
        for name in a
    )


def test_every_name_is_listed_with_its_dtype_shape_and_stride(kind: Format, path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.format == kind.name
    oracle = kind.read(path)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    assert tensors.keys() == oracle.keys() == sample().keys()
    for name, expected in oracle.items():
        assert f"torch.{tensors[name].dtype}" == str(expected.dtype)
        assert tensors[name].shape == tuple(expected.shape)
        if kind.keeps_views:
            assert tensors[name].stride == expected.stride()
            assert tensors[name].storage_offset == expected.storage_offset()
        assert tensors[name].kind == "tensor"


def test_every_value_is_what_its_own_library_reads(kind: Format, path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    for name, expected in kind.read(path).items():
        (tensor,) = [tensor for tensor in checkpoint.tensors if tensor.name == name]
        values = torch.from_numpy(values_of(checkpoint, tensor).copy())
        assert torch.equal(values, expected.to(values.dtype)), name


def test_ties_are_told_from_equal_tensors_stored_apart(kind: Format, path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    assert set(tied_names(checkpoint.tensors)) == {"0.weight", "2.weight"}
    assert judge(checkpoint, "0.weight", "2.weight").tied
    assert judge(checkpoint, "0.weight", "2.copy").reason == "not tied: equal values, but stored apart"
    (equal,) = find_ties(checkpoint, equal=True).equal
    assert set(equal.names) in ({"0.weight", "2.copy"}, {"2.weight", "2.copy"})


@pytest.mark.parametrize("index", ["0", "-1,1", ":,2", "::-2", "...,1:3", "5:2:-1,::3", "2:2"])
def test_a_slice_shows_what_torch_slices(kind: Format, path: Path, index: str) -> None:
    checkpoint = open_checkpoint(str(path))
    (shown,) = show(checkpoint, [f"0.weight[{index}]"])
    assert isinstance(shown, Shown)
    expected = eval(f"array[{index}]", {"array": kind.read(path)["0.weight"].numpy()})
    assert shown.array().shape == expected.shape
    assert (shown.array() == expected).all()


def test_a_prefix_is_the_submodule(kind: Format, path: Path) -> None:
    names = {item.label for item in show(open_checkpoint(str(path)), ["3"]) if isinstance(item, Shown)}
    assert names == {"3.running_mean", "3.steps", "3.mask"}


def test_set_changes_the_element_its_tied_name_and_nothing_else(kind: Format, path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in kind.read(path).items()}
    done = edit(path, "2.weight[0,-1]=100")
    assert (set(done.changed), set(done.also_changed)) == ({"2.weight"}, {"0.weight"})
    for name in ("0.weight", "2.weight"):
        before[name][0, -1] = 100
    assert same_states(kind.read(path), before)


def test_several_assignments_are_made_in_order(kind: Format, path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in kind.read(path).items()}
    edit(path, "0.bias=[1,2,3,4]", "0.bias[::2]*=-2", "3.steps+=1", "3.mask=true", "4.columns[:,1]=[9,8,7,6]")
    before["0.bias"].copy_(torch.tensor([-2, 2, -6, 4]))
    before["3.steps"] += 1
    before["3.mask"].fill_(True)
    before["4.columns"][:, 1] = torch.tensor([9, 8, 7, 6])
    assert same_states(kind.read(path), before)


def test_an_output_gets_the_change_and_the_file_stays(kind: Format, path: Path, tmp_path: Path) -> None:
    old = path.read_bytes()
    out = tmp_path / f"out{kind.suffix}"
    done = edit(path, "0.bias=0", output=out)
    assert not done.in_place
    assert path.read_bytes() == old
    assert kind.read(out)["0.bias"].eq(0).all()
    edit(path, "0.bias=0")
    assert out.read_bytes() == path.read_bytes()


def test_a_backup_is_the_old_file(kind: Format, path: Path) -> None:
    old = path.read_bytes()
    done = edit(path, "0.bias=0", backup=True)
    assert done.backup is not None
    assert Path(done.backup).read_bytes() == old
    assert path.read_bytes() != old


def test_a_bad_value_among_good_ones_changes_nothing(kind: Format, path: Path) -> None:
    old = path.read_bytes()
    with pytest.raises(ValueRefusedError):
        edit(path, "0.bias=0", "3.steps=1.5")
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_setting_what_stands_there_changes_no_byte(kind: Format, path: Path) -> None:
    old = path.read_bytes()
    assert edit(path, "3.steps=7").bytes_written == 0
    assert path.read_bytes() == old


def test_there_and_back_again_is_an_involution(kind: Format, path: Path) -> None:
    old = path.read_bytes()
    edit(path, "0.weight[1]*=-1", "3.steps=-5")
    assert path.read_bytes() != old
    edit(path, "0.weight[1]*=-1", "3.steps=7")
    assert path.read_bytes() == old


def test_a_file_cut_short_anywhere_is_refused_in_one_line(kind: Format, path: Path) -> None:
    whole = path.read_bytes()
    cut = path.with_name(f"cut{kind.suffix}")
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CkptError) as refused:
            _read_all(str(cut))
        assert refused.value.path == str(cut)
        assert "\n" not in str(refused.value)


def test_a_damaged_file_is_refused_or_read(kind: Format, path: Path) -> None:
    whole = path.read_bytes()
    damaged = path.with_name(f"damaged{kind.suffix}")
    generator = random.Random(20)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        damaged.write_bytes(data)
        error = _error_of(str(damaged))
        refused += error is not None
        assert error is None or error.path == str(damaged)
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
    assert {line.split("\t")[0] for line in answer[:-1]} == sample().keys()
