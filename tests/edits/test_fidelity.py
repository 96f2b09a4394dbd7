"""Structural edits held to the same edits made with torch: every fixture, every protocol, every command."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import io
import json
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pt import archive, torch_records
from conftest import Ckpt
from torch import nn

State = dict[str, Any]


class Stage(enum.Enum):
    """Where training is."""

    WARM = 1


class Meter:
    """An object with slots and a dict of its own."""

    def __init__(self) -> None:
        self.total, self.history = 3.5, [1, 2, 3]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Meter) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def net() -> nn.Module:
    """A network with a tie, buffers and several dtypes."""
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    made = nn.Sequential(shared, nn.ReLU(), shared, nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.float64))
    made.register_buffer("steps", torch.tensor(7))
    return made


def flat() -> Any:
    """A state_dict as torch makes it."""
    return net().state_dict()


def training() -> State:
    """A training checkpoint with all that people keep."""
    model = net()
    optimizer = torch.optim.Adam(model[3].parameters())
    model[3](torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], name="x"),
        "stage": Stage.WARM,
        "meter": Meter(),
        "best": np.float64(0.5),
        "seen": np.arange(6).reshape(2, 3),
        "loss": functools.partial(int, base=2),
        "history": collections.deque([1.0, 2.0], maxlen=5),
        "names": {"a", "b"},
        "raw": b"\xff\0bytes",
        "pair": (torch.ones(2), 5),
    }


def odd() -> State:
    """Tensors in every guise."""
    torch.manual_seed(1)
    big = torch.randn(20, 6)
    shared = torch.randn(3, 3)
    return {
        "a.shared": shared,
        "b.shared": shared,
        "b.view": shared[1],
        "slice": torch.randn(200, 6)[2:4],
        "columns": big.t()[1:3],
        "parameter": nn.Parameter(torch.randn(3), requires_grad=False),
        "sparse": torch.eye(3).to_sparse(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "half": torch.randn(5).half(),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "wide": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "meta": torch.empty(2, 2, device="meta"),
    }


FIXTURES: dict[str, Callable[[], Any]] = {"flat": flat, "training": training, "odd": odd}


def load(path: Path) -> Any:
    """What torch makes of a file that we wrote ourselves."""
    return torch.load(path, weights_only=False)


def storages(value: Any) -> list[tuple[int, ...]]:
    """What tells which tensors share storages: the place of each one's storage among those seen first to last."""
    seen: dict[int, int] = {}
    found = []
    for tensor in tensors(value):
        if tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel():
            key = tensor.untyped_storage().data_ptr()
            found.append((seen.setdefault(key, len(seen)), tensor.storage_offset(), *tensor.stride()))
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in an object, in its order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal object for object: types, order, values bit for bit, attributes."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert_same_tensor(found, wanted, where)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
        assert_same(getattr(found, "__dict__", None), getattr(wanted, "__dict__", None), f"{where}.__dict__")
    elif isinstance(wanted, list | tuple | collections.deque):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}.{index}")
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype, where
        assert (found == wanted).all(), where
    elif isinstance(wanted, functools.partial):
        assert (found.func, found.args, found.keywords) == (wanted.func, wanted.args, wanted.keywords), where
    else:
        assert found == wanted, where


def assert_same_tensor(found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    """Equal in dtype, shape, layout, gradient and every bit."""
    for fact in ("dtype", "shape", "layout", "device", "requires_grad"):
        assert getattr(found, fact) == getattr(wanted, fact), f"{where}: {fact}"
    if wanted.device.type == "meta":
        return
    if wanted.layout is not torch.strided:
        assert torch.equal(found.indices(), wanted.indices()), where
        assert torch.equal(found.values().view(torch.uint8), wanted.values().view(torch.uint8)), where
        return
    one, other = (tensor.detach().resolve_conj().contiguous().flatten() for tensor in (found, wanted))
    assert torch.equal(
        one.view(torch.uint8) if one.numel() else one, other.view(torch.uint8) if other.numel() else other
    ), where


def strip(state: Any, old: str, new: str) -> Any:
    """A state_dict with one prefix in the place of another, as torch's own helper does it, `_metadata` too."""
    made = type(state)((new + key[len(old) :] if key.startswith(old) else key, value) for key, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        named = ((_module(key, old, new), value) for key, value in metadata.items())
        made._metadata = type(metadata)(named)
    return made


def _module(key: str, old: str, new: str) -> str:
    return (new + f"{key}."[len(old) :]).removesuffix(".") if f"{key}.".startswith(old) and key else key


def pop(state: Any, *keys: str) -> Any:
    """A state_dict without some keys."""
    for key in keys:
        del state[key]
    return state


def without_modules(state: Any, *modules: str) -> Any:
    """A state_dict whose `_metadata` has no note on some modules."""
    for module in modules:
        del state._metadata[module]
    return state


def recast(state: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in an object in another dtype, with its sharing."""
    made: dict[int, torch.Tensor] = {}

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype or tensor.device.type == "meta":
            return tensor
        if tensor.layout is not torch.strided:
            return tensor.to(dtype)
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
        key = storage.data_ptr()
        cast = made.setdefault(key, whole.to(dtype))
        view = torch.empty(0, dtype=dtype).set_(
            cast.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view

    return _mapped(state, one)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        for key in value:
            value[key] = _mapped(value[key], change)
    elif isinstance(value, list):
        value[:] = [_mapped(item, change) for item in value]
    elif isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    return value


def with_(state: Any, **changes: Any) -> Any:
    """A dict with other values under some keys, in their places."""
    state.update(changes)
    return state


def deep(state: Any, path: str, value: Any) -> Any:
    """An object in which something deep down is another value."""
    *outer, last = path.split(".")
    at = state
    for part in outer:
        at = at[int(part)] if isinstance(at, list) else at[part] if isinstance(at, dict) else getattr(at, part)
    if isinstance(at, dict):
        at[last] = value
    else:
        setattr(at, last, value)
    return state


EDITS: dict[str, tuple[str, list[str], Callable[[Any], Any]]] = {
    "rename one": ("flat", ["rename", "F", "4.bias", "4.offset"], lambda s: strip(s, "4.bias", "4.offset")),
    "rename a prefix": ("flat", ["rename", "F", "3", "norm.1"], lambda s: strip(s, "3.", "norm.1.")),
    "add a prefix": ("flat", ["rename", "F", "--add", "module"], lambda s: strip(s, "", "module.")),
    "rename by expression": ("flat", ["rename", "F", "--sub", r"^(\d)\.", r"layers.\1."],
                             lambda s: functools.reduce(lambda t, n: strip(t, f"{n}.", f"layers.{n}."), range(5), s)),
    "rename a container": ("training", ["rename", "F", "model", "net"],
                           lambda s: {"net" if k == "model" else k: v for k, v in s.items()}),
    "rename inside": ("training", ["rename", "F", "model.3", "model.norm"],
                      lambda s: with_(s, model=strip(s["model"], "3.", "norm."))),
    "rename a number": ("training", ["rename", "F", "optimizer.state.0", "optimizer.state.9"],
                        lambda s: deep(s, "optimizer.state",
                                       {9 if k == 0 else k: v for k, v in s["optimizer"]["state"].items()})),
    "remove one": ("flat", ["rm", "F", "4.bias"], lambda s: pop(s, "4.bias")),
    "remove a module": ("flat", ["rm", "F", "4"], lambda s: without_modules(pop(s, "4.weight", "4.bias"), "4")),
    "remove the optimizer": ("training", ["rm", "F", "optimizer"], lambda s: pop(s, "optimizer")),
    "remove objects": ("training", ["rm", "F", "args", "meter", "stage", "seen"],
                       lambda s: pop(s, "args", "meter", "stage", "seen")),
    "keep a part": ("training", ["keep", "F", "model", "epoch"], lambda s: {k: s[k] for k in ("model", "epoch")}),
    "keep the root": ("training", ["keep", "F", "--root", "model"], lambda s: s["model"]),
    "cast all": ("training", ["cast", "F", "bf16"], lambda s: recast(s, torch.bfloat16)),
    "cast to float64": ("odd", ["cast", "F", "float64"], lambda s: recast(s, torch.float64)),
    "cast to float8": ("odd", ["cast", "F", "float8_e5m2", "--lossy"], lambda s: recast(s, torch.float8_e5m2)),
    "tie": ("odd", ["tie", "F", "a.shared", "c", "--force"], lambda s: s),
    "set a number": ("training", ["set", "F", "epoch=9"], lambda s: with_(s, epoch=9)),
    "set a rate": ("training", ["set", "F", "optimizer.param_groups.0.lr=0.5"],
                   lambda s: deep(s, "optimizer.param_groups.0.lr", 0.5)),
    "set an attribute": ("training", ["set", "F", "args.name=\"longer than it was\"", "args.layers=[3,4,5]"],
                         lambda s: deep(deep(s, "args.name", "longer than it was"), "args.layers", [3, 4, 5])),
    "set a new key": ("training", ["set", "F", "--new", "note=\"hi\"", "args.seed=1"],
                      lambda s: deep(with_(s, note="hi"), "args.seed", 1)),
}  # fmt: skip

EDITS.pop("tie")


Made = dict[tuple[str, int, bool], bytes]
"""Fixtures by their name, protocol, and whether they are zip files."""


@pytest.fixture(scope="module")
def made() -> Made:
    """Every fixture as torch saves it with every protocol, as a zip file and as a legacy stream."""
    found = {}
    for name, make in FIXTURES.items():
        for protocol in (2, 3, 4, 5):
            for is_zip in (True, False):
                value = make()
                if not is_zip and name == "odd":
                    del value["float8"], value["wide"]  # which torch cannot load from a legacy stream
                buffer = io.BytesIO()
                torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
                found[name, protocol, is_zip] = buffer.getvalue()
    return found


def fixture_of(name: str, *, is_zip: bool) -> Any:
    """The object that a fixture is of."""
    value = FIXTURES[name]()
    if not is_zip and name == "odd":
        del value["float8"], value["wide"]
    return value


CASES = [
    pytest.param(edit, protocol, is_zip, id=f"{edit}-{protocol}-{'zip' if is_zip else 'legacy'}")
    for edit in EDITS
    for protocol in (2, 3, 4, 5)
    for is_zip in (True, False)
    if is_zip or edit != "cast to float8"  # which torch cannot load from a legacy stream
]


@pytest.mark.parametrize(("edit", "protocol", "is_zip"), CASES)
def test_an_edit_is_what_the_same_edit_in_torch_makes(
    tmp_path: Path, ckpt: Ckpt, made: Made, edit: str, protocol: int, is_zip: bool
) -> None:
    fixture, arguments, in_torch = EDITS[edit]
    path = tmp_path / "model.pt"
    path.write_bytes(made[fixture, protocol, is_zip])
    wanted = in_torch(fixture_of(fixture, is_zip=is_zip))
    answer = ckpt(*[str(path) if argument == "F" else argument for argument in arguments])
    assert answer.code == 0, answer.err
    found = load(path)
    assert_same(found, wanted)
    assert storages(found) == storages(wanted)
    if not is_zip:
        return
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    offsets = torch.load(path, map_location="meta", weights_only=False)
    assert [tensor.shape for tensor in tensors(offsets)] == [tensor.shape for tensor in tensors(wanted)]


def test_a_legacy_stream_takes_float8_though_torch_cannot_load_it(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.tensor([1.0, 2.0])}, path, _use_new_zipfile_serialization=False)
    assert ckpt("cast", path, "float8_e5m2").code == 0
    assert ckpt("show", path, "a").out == "tensor([1., 2.], dtype=torch.float8_e5m2)\n"


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("fixture", FIXTURES)
def test_an_output_leaves_the_file_and_is_the_same(
    tmp_path: Path, ckpt: Ckpt, made: Made, fixture: str, protocol: int, is_zip: bool
) -> None:
    """An edit and its reverse bring the file back, byte for byte where no key is also used as a value."""
    path, there, back = (tmp_path / name for name in ("model.pt", "there.pt", "back.pt"))
    old = made[fixture, protocol, is_zip]
    path.write_bytes(old)
    assert ckpt("rename", path, "--add", "x", "-o", there).code == 0
    assert path.read_bytes() == old
    assert ckpt("rename", there, "--strip", "x", "-o", back).code == 0
    assert_same(load(back), fixture_of(fixture, is_zip=is_zip))
    if protocol == 2 and fixture != "training":
        assert records(back) == records(path) if is_zip else back.read_bytes() == old


def records(path: Path) -> dict[str, bytes]:
    """Every record by its name below the prefix."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_computed_offsets_agree_with_where_the_bytes_are(tmp_path: Path, ckpt: Ckpt) -> None:
    """With `.format_version` torch computes offsets; FakeTensorMode and `map_location="meta"` rely on it."""
    path = tmp_path / "a.pt"
    torch.save(odd() | training(), path)
    edits = (["rm", "a.shared", "optimizer"], ["rename", "--add", "prefix"], ["cast", "bf16"], ["compact"])
    for edit in (*edits, ["rename", "--strip", "prefix"]):
        done = ckpt(edit[0], path, *edit[1:])
        assert done.code == 0
        assert ("in place" in done.err) == (edit[0] == "rename")
        reader = torch._C.PyTorchFileReader(str(path))
        with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
            computed = torch.load(path, weights_only=False)
        assert_same(computed, load(path))
        keys = [name for name in reader.get_all_records() if name.startswith("data/")]
        assert keys == [f"data/{number}" for number in range(len(keys))]


def test_a_tie_is_one_storage_and_untie_takes_it_apart(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3), "b": torch.ones(3), "c": torch.zeros(3)}, path)
    assert ckpt("tie", path, "a", "b").code == 0
    found = load(path)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    refused = ckpt("tie", path, "a", "c")
    assert (refused.code, "different values" in refused.err) == (2, True)
    assert ckpt("tie", path, "a", "c", "--force").code == 0
    assert load(path)["c"].eq(1).all()
    assert ckpt("untie", path, "b").code == 0
    found = load(path)
    assert found["a"].data_ptr() == found["c"].data_ptr() != found["b"].data_ptr()
    assert ckpt("untie", path, "b").code == 2


def test_compact_keeps_every_value_and_sharing_and_drops_the_rest(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save(odd(), path)
    before = path.stat().st_size
    answer = ckpt("compact", path)
    assert answer.code == 0, answer.err
    found, wanted = load(path), odd()
    assert_same(found, wanted)
    assert found["a.shared"].data_ptr() == found["b.shared"].data_ptr()
    assert found["b.view"].data_ptr() == found["b.shared"].data_ptr() + 12
    assert path.stat().st_size < before
    assert ckpt("ls", "--waste", path).out == ""
    assert ckpt("compact", path).code == 2


def test_a_whole_module_is_edited_without_its_class(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "net.pt"
    torch.save(net(), path)
    assert ckpt("cast", path, "bfloat16").code == 0
    found = load(path)
    wanted = net().bfloat16()
    assert_same(found.state_dict(), wanted.state_dict())
    assert found[0] is found[2]
    assert ckpt("set", path, "3.eps=0.5").code == 0
    assert load(path)[3].eps == 0.5
    assert ckpt("untie", path, "2.weight").code == 2  # it is one module, not two tied ones
    old = path.read_bytes()
    refused = ckpt("rename", path, "2.weight", "2.w")
    assert (refused.code, "several names are kept in one object" in refused.err) == (2, True)
    assert path.read_bytes() == old


def test_a_shorter_pickle_goes_into_the_room_before_the_first_storage(tmp_path: Path, ckpt: Ckpt) -> None:
    """So that a rename of any file costs what its pickle costs, through the journal, checksums included."""
    path = tmp_path / "a.pt"
    state = {f"module.layers.{number}.weight": torch.full((300,), float(number)) for number in range(50)}
    torch.save(state, path)
    before = path.stat()
    told = json.loads(ckpt("rename", path, "--strip", "module", "--json").out)
    assert (told["in_place"], told["patched"]) == (True, True)
    assert told["bytes_written"] < 20_000
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
    wanted = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for options in ({}, {"mmap": True}):
        assert_same(torch.load(path, **options), wanted)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert ckpt("set", path, "layers.3.weight[0]=100").code == 0
    assert load(path)["layers.3.weight"][0] == 100
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
        assert load(path)["layers.49.weight"][0] == 49
    assert json.loads(ckpt("rename", path, "--add", "module", "--json").out)["patched"]  # the room is there again
    assert_same(load(path)["module.layers.1.weight"], state["module.layers.1.weight"])


def test_a_longer_pickle_goes_behind_the_storages_and_stays_there(tmp_path: Path, ckpt: Ckpt) -> None:
    """So that no name costs a copy of the file; the record is grown and cut where it is from then on."""
    path = tmp_path / "a.pt"
    state = {f"layers.{number}.weight": torch.full((3000,), float(number)) for number in range(150)}
    state["tied"] = state["layers.3.weight"]
    torch.save(state, path)
    before = path.stat()
    prefixes = ["", "a.very.long.prefix.that.nobody.would.leave.room.for", "shorter", "x" * 900, "y"]
    for old, new in pairwise(prefixes):
        edit = ["--add", new] if not old else [old, new]
        planned = json.loads(ckpt("rename", path, *edit, "--json", "--dry-run").out)
        told = json.loads(ckpt("rename", path, *edit, "--json").out)
        assert told["patched"]
        assert told["bytes_written"] == planned["bytes_written"] < 400_000 < path.stat().st_size
        assert path.stat().st_ino == before.st_ino
        wanted = {f"{new}.{name}": tensor for name, tensor in state.items()}
        for options in ({}, {"mmap": True}):
            assert_same(torch.load(path, **options), wanted)
        with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
            assert_same(torch.load(path), wanted)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert (ckpt("check", "--deep", path).code, ckpt("scan", path).code) == (0, 0)
    assert path.stat().st_size < before.st_size + 40_000
    assert ckpt("set", path, "y.layers.3.weight[0]=100", "epoch=3", "--new").code == 0
    found = load(path)
    assert (found["y.tied"][0], found["epoch"]) == (100, 3)
    compacted = ckpt("compact", path, "-o", tmp_path / "b.pt")
    assert (compacted.code, compacted.err.splitlines()[0]) == (0, f"{path}: compacted it")
    torch.save(found, tmp_path / "c.pt")
    names = [zipfile.ZipFile(tmp_path / name).namelist() for name in ("b.pt", "c.pt")]
    assert [name.split("/", 1)[1] for name in names[0]] == [name.split("/", 1)[1] for name in names[1]]
    assert ckpt("convert", path, tmp_path / "d.pt", "--json").code == 0
    assert not [name for name in zipfile.ZipFile(tmp_path / "d.pt").namelist() if "room" in name]


def test_the_end_of_a_file_with_a_comment_is_left_as_it_is(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"of somebody"
    told = json.loads(ckpt("rename", path, "--add", "n" * 7_000, "--json").out)
    assert not told["patched"]
    assert_same(load(path), {"n" * 7_000 + ".w": torch.ones(3)})


def test_an_archive_whose_name_is_no_utf_8_takes_a_longer_pickle_too(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive(torch_records({"w": 1, "v": 2}, prefix="caf\udce9")))
    done = ckpt("rename", path, "w", "a.longer.name" * 9)
    assert (done.code, "in place" in done.err) == (0, True), done.err
    assert load(path) == {"a.longer.name" * 9: 1, "v": 2}
