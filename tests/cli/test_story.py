"""The lesson's story, from the shell: look, show, prove ties, change a number and see every name change."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, load_model
from torch import nn

MLP = ["mlp.pt", "mlp.safetensors"]
TIED = ["tied.pt", "tied.safetensors"]


def read(path: Path | str) -> dict[str, torch.Tensor]:
    """A state_dict as torch and safetensors read it, ties kept."""
    if str(path).endswith(".pt"):
        return torch.load(path, weights_only=True)
    if "tied" not in str(path):
        return load_file(path)
    shared = nn.Linear(8, 8)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
    )
    load_model(net, path)
    return net.state_dict()


# --- look ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", MLP)
def test_ls_tells_name_dtype_shape_and_bytes_of_every_tensor(work: Path, ckpt: Ckpt, file: str) -> None:
    expected = {f"{name}\tfloat32\t[{','.join(map(str, t.shape))}]\t{t.nbytes}" for name, t in read(file).items()}
    answer = ckpt("ls", file)
    assert set(answer.lines) == expected
    assert (answer.code, answer.err) == (0, "")


@pytest.mark.parametrize("file", MLP)
def test_show_prints_a_parameter_as_torch_prints_it(work: Path, ckpt: Ckpt, file: str) -> None:
    for name, tensor in read(file).items():
        assert ckpt("show", file, name).out == f"{tensor}\n"


@pytest.mark.parametrize("file", MLP)
def test_show_prints_a_whole_state_dict(work: Path, ckpt: Ckpt, file: str) -> None:
    answer = ckpt("show", file).out
    for name, tensor in read(file).items():
        separator = "\n" if tensor.ndim > 1 and len(tensor) > 1 else " "
        assert f"{name} ={separator}{tensor}\n" in answer


@pytest.mark.parametrize("file", MLP)
def test_show_of_a_prefix_prints_a_submodule(work: Path, ckpt: Ckpt, file: str) -> None:
    state = read(file)
    answer = ckpt("show", file, "2")
    assert set(answer.lines) == {f"2.weight = {state['2.weight']}", f"2.bias = {state['2.bias']}"}


@pytest.mark.parametrize("file", MLP)
def test_show_of_a_slice_prints_that_slice(work: Path, ckpt: Ckpt, file: str) -> None:
    weight = read(file)["0.weight"]
    assert ckpt("show", file, "0.weight[0,:2]").out == f"{weight[0, :2]!r}\n"
    assert ckpt("show", file, "0.weight[-1]").out == f"{weight[-1]!r}\n"
    assert ckpt("show", file, "0.weight[3,3]").out == f"{weight[3, 3]!r}\n"
    assert ckpt("show", file, "0.weight[::4,...]").out == f"{weight[::4]!r}\n"


def test_ls_long_tells_storages_and_which_names_are_tied(work: Path, ckpt: Ckpt) -> None:
    rows = {line.split("\t")[0]: line.split("\t")[4:] for line in ckpt("ls", "-l", "tied.pt").lines}
    assert rows["2.weight"] == ["tensor", "no", "cpu", "[8,1]", "2", "0", "1", "strided"]
    assert rows["4.weight"] == rows["2.weight"]
    assert rows["2.bias"][6] == rows["4.bias"][6] == "2"
    assert rows["6.bias"][6] == ""


# --- ties ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", TIED)
def test_ties_names_the_tensors_that_are_one(work: Path, ckpt: Ckpt, file: str) -> None:
    tied = json.loads(ckpt("ties", "--json", file).out)["tied"]
    assert sorted(group["names"] for group in tied) == [["2.bias", "4.bias"], ["2.weight", "4.weight"]]


def test_ties_tells_equal_tensors_from_tied_ones(work: Path, ckpt: Ckpt) -> None:
    without, answer = ckpt("ties", "tied.pt"), ckpt("ties", "--equal", "tied.pt")
    assert "6.bias" not in without.out
    assert answer.lines == [*without.lines, "equal\t2.bias,6.bias\t\tstored apart\t32\t"]


@pytest.mark.parametrize("file", TIED)
@pytest.mark.parametrize(
    ("a", "b", "code", "words"),
    [
        ("2.weight", "4.weight", 0, "tied: one tensor"),
        ("4.weight", "2.weight", 0, "tied: one tensor"),
        ("2", "4", 0, "tied: the same tensors"),
        ("2.bias", "6.bias", 1, "not tied: equal values, but stored apart"),
        ("2.weight", "6.weight", 1, "not tied: different values, stored apart"),
        ("0.weight", "2.weight", 1, "not tied: they differ in dtype or shape"),
    ],
)
def test_ties_of_two_names_answers_by_its_exit_code(
    work: Path, ckpt: Ckpt, file: str, a: str, b: str, code: int, words: str
) -> None:
    answer = ckpt("ties", file, a, b)
    assert (answer.code, answer.out, answer.err) == (code, f"{words}\n", "")


def test_two_submodules_are_not_tied_when_one_of_their_tensors_is_not(work: Path, ckpt: Ckpt) -> None:
    answer = ckpt("ties", "tied.pt", "2", "6")
    assert (answer.code, answer.out) == (1, "not tied: weight: different values, stored apart\n")


# --- edit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", TIED)
def test_set_changes_every_tied_name_and_says_so(work: Path, ckpt: Ckpt, file: str) -> None:
    answer = ckpt("set", file, "4.weight[0,0]=100")
    assert answer.code == 0
    assert answer.out == ""
    assert answer.err.splitlines()[:2] == [
        f"{file}: set 4.weight",
        "  2.weight also changed: it shares these bytes",
    ]
    assert ckpt("show", file, "2.weight[0,0]").out == ckpt("show", file, "4.weight[0,0]").out == "tensor(100.)\n"
    state = read(file)
    assert state["2.weight"][0, 0] == state["4.weight"][0, 0] == 100
    assert state["2.weight"].data_ptr() == state["4.weight"].data_ptr()


@pytest.mark.parametrize("file", TIED)
def test_set_changes_nothing_else(work: Path, ckpt: Ckpt, file: str) -> None:
    before = read(file)
    ckpt("set", file, "4.weight[0,0]=100")
    after = read(file)
    before["2.weight"].data[0, 0] = before["4.weight"].data[0, 0] = 100
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_equal_tensor_that_is_stored_apart_stays(work: Path, ckpt: Ckpt) -> None:
    ckpt("set", "tied.pt", "2.bias=0")
    state = read("tied.pt")
    assert not state["4.bias"].any()
    assert state["6.bias"].any()


@pytest.mark.parametrize("file", TIED)
def test_set_with_an_output_leaves_the_file_alone(work: Path, ckpt: Ckpt, file: str) -> None:
    output = f"tied-out{Path(file).suffix}"
    before = Path(file).read_bytes()
    answer = ckpt("set", file, "2.weight[0,0]=100", "-o", output)
    assert answer.err.splitlines()[-1] == f"  written to {output}, {len(before):,} bytes"
    assert Path(file).read_bytes() == before
    assert read(output)["4.weight"][0, 0] == 100
    assert ckpt("ties", output, "2", "4").code == 0


def test_the_edited_file_is_a_sound_zip(work: Path, ckpt: Ckpt) -> None:
    ckpt("set", "tied.pt", "2.weight*=0.5", "0.bias[::2]=nan")
    with zipfile.ZipFile("tied.pt") as archive:
        assert archive.testzip() is None


# --- a training checkpoint with a class that nobody can import -------------------------------------------------------


def test_ls_all_lists_what_is_no_tensor_too(work: Path, ckpt: Ckpt) -> None:
    lines = ckpt("ls", "-a", "train.pt").lines
    assert "epoch\tint\t\t\t2" in lines
    assert "optimizer.param_groups.0.lr\tfloat\t\t\t0.001" in lines
    assert "meter.sum\tfloat\t\t\t3.5" in lines
    assert "args.data\tstr\t\t\t'imagenet'" in lines
    assert "optimizer.state.3.exp_avg\tfloat32\t[1]\t4\t" in lines


def test_show_prints_an_epoch_and_a_learning_rate_bare(work: Path, ckpt: Ckpt) -> None:
    assert ckpt("show", "train.pt", "epoch").out == "2\n"
    assert ckpt("show", "train.pt", "optimizer.param_groups.0.lr").out == "0.001\n"
    assert ckpt("show", "train.pt", "args.data").out == "imagenet\n"


def test_the_class_that_nobody_can_import_is_told_and_not_needed(work: Path, ckpt: Ckpt) -> None:
    with pytest.raises(ModuleNotFoundError, match="lab"):
        torch.load("train.pt", weights_only=False)
    objects = json.loads(ckpt("info", "--json", "train.pt").out)["objects"]
    assert objects == ["argparse.Namespace", "lab.meters.AverageMeter"]


def test_set_changes_no_byte_but_the_tensor_and_its_two_checksums(work: Path, ckpt: Ckpt) -> None:
    before = Path("train.pt").read_bytes()
    assert ckpt("set", "train.pt", "model.0.bias=0").code == 0
    after = Path("train.pt").read_bytes()
    record = 1  # model.0.weight is record 0
    with zipfile.ZipFile("train.pt") as archive:
        assert archive.testzip() is None
        info = archive.getinfo(f"train/data/{record}")
        name, extra = struct.unpack_from("<HH", after, info.header_offset + 26)
        data = info.header_offset + 30 + name + extra
        central = after.index(info.filename.encode(), archive.start_dir) - 46
    allowed = {*range(data, data + 32), *range(data + 32 + 4, data + 32 + 8), *range(central + 16, central + 20)}
    changed = {at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
    assert changed <= allowed
    assert after[data : data + 32] == bytes(32)
    assert after[data + 36 : data + 40] == after[central + 16 : central + 20] != before[central + 16 : central + 20]


def test_a_value_that_is_no_tensor_is_set(work: Path, ckpt: Ckpt) -> None:
    assert ckpt("set", "train.pt", "epoch=7").code == 0
    assert ckpt("show", "train.pt", "epoch").out == "7\n"
