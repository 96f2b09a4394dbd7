"""What torch.save wrote before 1.6, and what pickle.dump writes: streams of pickles, one or several in a file."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import old, pt
from builders.pickles import call, named, new, ordered_dict, persistent, pickled, put, raw_string, tensor
from conftest import Ckpt, refused

import ckpt_cli
from ckpt_cli.errors import FormatError, LimitError, MalformedError, TruncatedError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Opaque, Tensor, Value

ROW = struct.pack("<4f", 1, 2, 3, 4)


def write(folder: Path, content: bytes, name: str = "model.pt") -> str:
    """A file of that content."""
    path = folder / name
    path.write_bytes(content)
    return str(path)


def legacy(item: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(item, buffer, _use_new_zipfile_serialization=False, **options)
    return buffer.getvalue()


def view(reference: bytes, shape: tuple[int, ...] = (4,), offset: int = 0) -> Any:
    """A contiguous view of a referred storage."""
    stride = tuple(torch.empty(shape).stride())
    return call("torch._utils._rebuild_tensor_v2", reference, offset, shape, stride, False, ordered_dict())


# --- the stream of torch.save ----------------------------------------------------------------------------------------


def test_a_save_byte_by_byte_loads_in_torch_and_here(tmp_path: Path) -> None:
    path = write(tmp_path, old.save({"a": view(old.reference("7", 4)), "epoch": 3}, {"7": ROW}))
    assert torch.load(path, weights_only=False)["a"].tolist() == [1, 2, 3, 4]
    with ckpt_cli.open(path) as checkpoint:
        assert checkpoint.format == "legacy"
        assert checkpoint["a"].numpy().tolist() == [1, 2, 3, 4]
        assert checkpoint["epoch"] == 3


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_that_torch_could_write_is_read(protocol: int, tmp_path: Path) -> None:
    path = write(
        tmp_path, legacy({"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16)}, pickle_protocol=protocol)
    )
    with ckpt_cli.open(path) as checkpoint:
        assert checkpoint.format == "legacy"
        assert checkpoint["a"].numpy().tolist() == [0, 1, 2]
        assert checkpoint["b"].numpy().tolist() == [1, 1]


def test_float8_that_torch_writes_and_cannot_load_is_read_and_set(tmp_path: Path, ckpt: Ckpt) -> None:
    path = write(
        tmp_path,
        legacy({"f8": torch.tensor([0.5, 448]).to(torch.float8_e4m3fn), "u": torch.ones(2, dtype=torch.uint16)}),
    )
    assert ckpt("set", path, "f8[0]=2").code == 0
    with ckpt_cli.open(path) as checkpoint:
        assert checkpoint["f8"].dtype == "float8_e4m3fn"
        assert checkpoint["f8"].numpy().tolist() == [2, 448]
        assert checkpoint["u"].numpy().tolist() == [1, 1]


def test_a_storage_that_was_referred_to_untyped_first_is_as_wide_as_its_bytes(tmp_path: Path) -> None:
    references = old.reference("7", 16, "Untyped"), old.reference("7", 4), old.reference("8", 2)
    root = [references[0], {"a": view(references[1])}, view(references[2], (2,))]
    path = write(tmp_path, old.save(root, {"7": ROW, "8": struct.pack("<2f", 1, 1)}, itemsize={"7": 1, "8": 4}))
    names = {entry.name: entry for entry in open_checkpoint(path).entries}
    assert [isinstance(names[name], Tensor) and names[name].shape for name in ("0", "1.a", "2")] == [(16,), (4,), (2,)]
    assert ckpt_cli.load(path)["2"].tolist() == [1, 1]


def test_the_byte_order_of_the_machine_changes_nothing_as_bytes_are_always_little_endian(tmp_path: Path) -> None:
    content = old.save({"a": view(old.reference("7", 4))}, {"7": ROW}, little_endian=False)
    path = write(tmp_path, content)
    assert torch.equal(torch.load(path, weights_only=False)["a"], ckpt_cli.load(path)["a"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_views_of_storages_as_torch_0_3_wrote_them_share_bytes(tmp_path: Path, ckpt: Ckpt) -> None:
    first, second, whole = (
        old.reference("7", 4, view=("8", 1, 2)),
        old.reference("7", 4, view=("9", 2, 2)),
        old.reference("7", 4),
    )
    root = {"first": view(first, (2,)), "second": view(second, (1,), 1), "whole": view(whole)}
    path = write(tmp_path, old.save(root, {"7": ROW}))
    oracle = torch.load(path, weights_only=False)
    for name, value in ckpt_cli.load(path).items():
        assert value.tolist() == oracle[name].tolist()
    done = ckpt("set", path, "first[1]=9")
    assert "whole also changed" in done.err
    oracle = torch.load(path, weights_only=False)
    assert (oracle["whole"].tolist(), oracle["second"].tolist()) == ([1, 2, 9, 4], [4])


def test_a_view_beyond_its_part_of_a_storage_is_refused(tmp_path: Path) -> None:
    beyond = old.save({"a": view(old.reference("7", 4, view=("8", 1, 2)), (3,))}, {"7": ROW})
    assert "needs bytes 4–16" in str(refused(write(tmp_path, beyond)))
    outside = old.save({"a": view(old.reference("7", 4, view=("8", 3, 2)), (2,))}, {"7": ROW})
    assert "elements 3–5" in str(refused(write(tmp_path, outside)))


def test_a_whole_module_opens_up_without_its_class_or_source(tmp_path: Path) -> None:
    state = {"_parameters": {"weight": view(old.reference("7", 4))}, "_buffers": {}, "_modules": {}, "training": True}
    made = new(old.module("lab.models.Net", "lab/models.py", "class Net(Module): ..."))
    path = write(tmp_path, old.save(pickle_build(made, state), {"7": ROW}))
    (weight, training) = open_checkpoint(path).entries
    assert isinstance(weight, Tensor)
    assert (weight.name, weight.kind, training.name) == ("weight", "parameter", "training")
    assert "lab.models.Net" in open_checkpoint(path).objects


def pickle_build(target: bytes, state: Any) -> Any:
    """An object with its state."""
    from builders.pickles import Ops, built

    return built(Ops(target), state)


def test_a_module_that_torch_saved_whole_has_the_state_that_torch_loads(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    path = write(tmp_path, legacy(net))
    assert {name: value.tolist() for name, value in ckpt_cli.load(path).items()} == {
        name: value.tolist() for name, value in net.state_dict().items()
    }


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    reference = old.reference(raw_string(b"7"), 4, location=raw_string(b"cuda:1"), tag=raw_string(b"storage"))
    root = ordered_dict([(raw_string(b"a"), view(reference)), (raw_string(b"name"), raw_string(b"caf\xe9"))])
    path = write(tmp_path, old.save(root, {"7": ROW}, keys=[raw_string(b"7")]))
    first, second = open_checkpoint(path).entries
    assert isinstance(first, Tensor)
    assert (first.device, second) == ("cuda:1", Value("name", "café"))
    assert ckpt_cli.load(path)["a"].tolist() == [1, 2, 3, 4]


def test_parameters_of_before_0_4_are_read(tmp_path: Path) -> None:
    data = put(9, view(old.reference("7", 4)))
    root = {
        "p": call("torch.nn.parameter.Parameter", data, True),
        "v": call("torch.autograd.variable.Variable", data, False),
    }
    first, second = open_checkpoint(write(tmp_path, old.save(root, {"7": ROW}))).tensors
    assert (first.kind, first.requires_grad) == ("parameter", True)
    assert (second.kind, second.requires_grad) == ("tensor", False)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (old.save({}, version=1000), "protocol version"),
        (old.save({"a": view(old.reference("7", 4))}), "does not have storage '7'"),
        (
            old.save({"a": view(old.reference("7", 4))}, {"7": ROW}, numels={"7": 3}),
            "has 3 elements, the pickle says 4",
        ),
        (old.save({"a": view(old.reference("7", 4))}, {"7": ROW}, numels={"7": -4}), "has -4 elements"),
        (old.save({"a": 1}, {"7": ROW}), "a storage '7' that nothing refers to"),
        (old.save({"a": view(old.reference("7", 4))}, {"7": ROW}, keys=[3]), "lists a storage None"),
        (
            old.save({"a": view(old.reference("7", 1 << 60))}, {"7": ROW}, numels={"7": 1 << 60}),
            "storage '7' needs bytes",
        ),
        (old.save({"a": view(old.reference("7", 4, "Odd"))}, {"7": ROW}), "not a storage class"),
    ],
)
def test_a_save_that_torch_does_not_write_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    assert problem in str(refused(write(tmp_path, content)))


def test_a_truncated_storage_is_told_with_its_range(tmp_path: Path) -> None:
    content = old.save({"a": view(old.reference("7", 4))}, {"7": ROW})
    path = write(tmp_path, content[:-1])
    error = refused(path)
    assert isinstance(error, TruncatedError)
    assert (
        error.problem == f"storage '7' needs bytes {len(content) - 16}–{len(content)}, the file has {len(content) - 1}"
    )


@pytest.mark.parametrize("tail", [b"PK\5\6" + bytes(18), b"PK\3\4", b"ustar", b"garbage"])
def test_bytes_of_other_formats_within_a_save_mislead_nobody(tail: bytes, tmp_path: Path) -> None:
    data = torch.tensor(list(b"PK\3\4" + tail) * 20, dtype=torch.uint8)
    path = write(tmp_path, legacy({"a": data}))
    assert open_checkpoint(path).format == "legacy"
    assert torch.equal(ckpt_cli.load(path)["a"], data)


def test_a_file_whose_name_is_not_ascii_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, legacy({"ä": torch.ones(1)}), "модель.pt")
    assert list(ckpt_cli.load(path)) == ["ä"]


# --- several in one file ---------------------------------------------------------------------------------------------


def test_several_saves_are_listed_and_set_each_under_its_number(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "several.pt"
    with path.open("wb") as file:
        for number in range(3):
            torch.save({"a": torch.full((2,), float(number))}, file, _use_new_zipfile_serialization=False)
        torch.save(torch.ones(1), file, _use_new_zipfile_serialization=False)
    listed = ckpt("ls", path)
    assert [line.split("\t")[0] for line in listed.out.splitlines()] == ["a", "[1].a", "[2].a", "[3]"]
    assert "4 saves stand one after another" in listed.err
    assert ckpt("show", path, "[2].a[0]", "[1].").out == "[2].a[0] = tensor(2.)\n[1].a = tensor([1., 1.])\n"
    assert ckpt("set", path, "[1].a[1]=7").code == 0
    with path.open("rb") as file:
        assert [torch.load(file)["a"].tolist() for _ in range(3)] == [[0, 0], [1, 7], [2, 2]]
        assert torch.load(file).tolist() == [1]


def test_pickles_and_saves_may_follow_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, pickle.dumps({"n": 1}, 0) + legacy({"a": torch.ones(2)}) + pickle.dumps([2, 3], 1))
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format, [entry.name for entry in checkpoint.entries]) == ("pickle", ["n", "[1].a", "[2]"])
    assert ckpt_cli.load(path)["[1].a"].tolist() == [1, 1]


def test_what_follows_and_is_no_pickle_is_noted(tmp_path: Path) -> None:
    for junk in (b"\0" * 100, b"junk", b"PK\5\6" + bytes(18)):
        checkpoint = open_checkpoint(write(tmp_path, legacy({"a": torch.ones(2)}) + junk))
        (said,) = checkpoint.unread
        assert said.startswith(f"{len(junk)} bytes after the last pickle")


def test_a_second_save_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    content = legacy({"a": torch.ones(2)})
    error = refused(write(tmp_path, content + content[:-1]))
    assert isinstance(error, TruncatedError)
    assert f"save [1], which begins at byte {len(content)}" in error.problem


def test_no_more_saves_are_read_than_a_limit_allows(tmp_path: Path) -> None:
    assert isinstance(refused(write(tmp_path, pickle.dumps(1) * 5000)), LimitError)


# --- plain pickles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_is_no_checkpoint_is_listed(protocol: int, tmp_path: Path, ckpt: Ckpt) -> None:
    path = write(tmp_path, pickle.dumps({"lr": 0.1, "layers": [1, 2], "net": {"depth": 3}}, protocol))
    assert ckpt("ls", "-a", path).out.split() == [
        "lr",
        "float",
        "0.1",
        "layers",
        "list",
        "[1,",
        "2]",
        "net.depth",
        "int",
        "3",
    ]


@pytest.mark.parametrize("item", [[1.5, "x"], ("a", {"b": 1}), 7, "text", 2.5, [{}], None, 10**30, set(), {"a": True}])
@pytest.mark.parametrize("protocol", range(6))
def test_anything_that_is_pickled_is_known_for_a_pickle(item: object, protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(item, protocol)
    if protocol < 2 and not isinstance(item, list | tuple | dict):
        return  # a lone scalar in the old protocols looks like any text
    assert open_checkpoint(write(tmp_path, content)).format == "pickle"


@pytest.mark.parametrize("protocol", range(6))
def test_tensors_of_plain_pickle_dump_are_told_and_shown_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    item = {"w": weight, "tied": weight, "row": weight[1], "half": torch.ones(3, dtype=torch.float16),
            "large": torch.arange(40_000),
            "p": torch.nn.Parameter(torch.ones(2))}  # fmt: skip
    path = write(tmp_path, pickle.dumps(item, protocol))
    with ckpt_cli.open(path) as checkpoint:
        for name, expected in item.items():
            found = checkpoint[name]
            assert (f"torch.{found.dtype}", found.shape) == (str(expected.dtype), tuple(expected.shape))
            assert np.array_equal(found.numpy(), expected.detach().numpy())
        assert checkpoint["p"].kind == "parameter"


@pytest.mark.parametrize("protocol", range(6))
def test_they_are_set_where_their_bytes_stand_plainly_and_else_refused_in_one_line(
    protocol: int, tmp_path: Path, ckpt: Ckpt
) -> None:
    weight = torch.arange(4.0)
    path = write(tmp_path, pickle.dumps({"w": weight, "tied": weight, "big": torch.zeros(50_000)}, protocol))
    before = Path(path).read_bytes()
    done = ckpt("set", path, "w[1]=9", "big[-1]=1")
    if protocol < 3:
        assert done.code == 2
        assert "the pickle has these bytes as text (protocols 0 to 2)" in done.err.splitlines()[0]
        assert Path(path).read_bytes() == before
        return
    assert "tied also changed" in done.err
    found = pickle.loads(Path(path).read_bytes())
    assert found["tied"].tolist() == [0, 9, 2, 3]
    assert found["big"][-1] == 1


def test_a_module_of_plain_pickle_dump_has_its_state(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    path = write(tmp_path, pickle.dumps(net, 4))
    assert ckpt_cli.load(path)["weight"].tolist() == net.weight.tolist()


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        (b"", "ends before its STOP"),
        (b"PK\3\4", "opcode"),
        (old.save({"a": 1}), "holds something else"),
        (old.save(old.reference("7", 4), {"7": ROW})[:-1], "storage '7' needs bytes"),
    ],
)
def test_a_storage_within_a_pickle_that_is_damaged_is_refused(inside: bytes, problem: str, tmp_path: Path) -> None:
    damaged = view(call("torch.storage._load_from_bytes", inside))
    assert problem in str(refused(write(tmp_path, pickled({"a": damaged}, 3))))


def test_the_pickle_of_a_zip_file_by_itself_says_what_it_is(tmp_path: Path) -> None:
    error = refused(write(tmp_path, pickled({"a": tensor("0", (2,))})))
    assert "is it the data.pkl of a torch.save file?" in error.problem


def test_a_file_of_joblib_is_told_for_what_it_is(tmp_path: Path) -> None:
    wrapper = new("joblib.numpy_pickle.NumpyArrayWrapper")
    content = pickled({"a": wrapper})
    for each in (content, content[:-2] + b"\xff" * 40):
        assert isinstance(refused(write(tmp_path, each)), UnsupportedError)


def test_a_long_pickle_is_read_in_growing_pieces(tmp_path: Path) -> None:
    item = {f"layers.{number}.name": f"value {number}" for number in range(20_000)}
    path = write(tmp_path, pickle.dumps(item, 2) + pickle.dumps([7]))
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.entries) == 20_001
    assert checkpoint.entries[-1] == Value("[1]", [7])


def test_persistent_ids_of_others_are_values(tmp_path: Path) -> None:
    (entry,) = open_checkpoint(write(tmp_path, pickled({"a": persistent(("db", 7))}))).entries
    assert isinstance(entry, Value)
    assert isinstance(entry.value, Opaque)


def test_a_class_by_itself_is_a_value(tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path, pickled({"a": named("lab.Net")}))).entries[0].name == "a"


def test_the_same_pickle_in_a_zip_can_be_set_with_its_crc(tmp_path: Path, ckpt: Ckpt) -> None:
    import zipfile

    path = tmp_path / "zip.pt"
    torch.save({"a": np.arange(3.0), "t": torch.ones(2)}, path, pickle_protocol=4)
    assert ckpt("set", path, "a[1]=7").code == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert torch.load(path, weights_only=False)["a"].tolist() == [0, 7, 2]


def test_an_array_in_a_compressed_pickle_is_shown_and_not_set(tmp_path: Path, ckpt: Ckpt) -> None:
    records = pt.torch_records(pickle.dumps({"a": np.arange(3.0)}, 4))
    records[0].method = pt.DEFLATED
    path = write(tmp_path, pt.archive(records))
    assert ckpt("show", path, "a").out == "tensor([0., 1., 2.], dtype=torch.float64)\n"
    assert "the pickle that has these bytes is compressed" in ckpt("set", path, "a[0]=1").err


def test_errors_are_of_the_tree(tmp_path: Path) -> None:
    assert isinstance(refused(write(tmp_path, b"\x80\x02\xff.")), MalformedError)
    assert isinstance(refused(write(tmp_path, b"\x80\x02")), FormatError)
