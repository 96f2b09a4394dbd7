"""Every tensor of a pickle is an entry, or a part of one, wherever an object keeps it."""

from __future__ import annotations

import functools
import warnings
import zipfile
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from torch import nn

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.ops.aliasing import all_strided
from ckpt_cli.pickles.graph import Graph

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(TypedStorage|weight_norm|quantized|lr_scheduler|Lazy|NumPy|The PyTorch API of nested)"
)


def t(*shape: int) -> torch.Tensor:
    """A tensor with a storage of its own."""
    return torch.rand(*(shape or (3,)))


def called(*_: Any, **__: Any) -> None:
    """Something that a partial can be of."""


Pair = namedtuple("Pair", "a b")


class Slots:
    """An object without a dict."""

    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = t(), {"x": t()}


class Stateful:
    """An object with a state that only its class understands."""

    def __init__(self) -> None:
        self.kept = (t(), [{"k": t()}])

    def __reduce__(self) -> Any:
        return Stateful, (), self.kept

    def __setstate__(self, state: Any) -> None:
        self.kept = state


class Made:
    """An object that is made by a call with tensors."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> Any:
        return Made, (t(), {"q": t()}, "text")


class Keyword:
    """An object whose `__new__` takes tensors by keyword."""

    def __new__(cls, *_: Any, **__: Any) -> Keyword:
        return object.__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (t(),), {"word": t()}


class Mapped(OrderedDict[str, Any]):
    """A mapping with attributes."""


class Listed(list[Any]):
    """A list with attributes."""


class Keeper(nn.Module):
    """A module that keeps tensors where torch.nn.Module does not list them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self._defaults = {"total": t(), "deep": [t(), (t(), {"z": t()})], "n": 3}
        self._queue = deque([t()], maxlen=3)
        self._lists = defaultdict(list, {"k": [t()]})
        self._pair = Pair(t(), [t()])
        self._slots, self._itself, self._layers = Slots(), [self], [self.layer, nn.Linear(1, 1)]
        self.register_forward_hook(functools.partial(called, t(), k=t()))


def with_attribute(made: Any) -> Any:
    made.extra = {"e": t()}
    return made


def attributed(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    tensor.info, tensor.direct = {"k": t(), "l": [t()]}, t()  # type: ignore[attr-defined]  # torch keeps any
    return {"w": tensor}


def referring() -> nn.Module:
    """A network whose parameters know it."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in net.parameters():
        parameter.net, parameter.group = net, {"x": t()}  # type: ignore[attr-defined]  # likewise
    return net


def optimizer() -> torch.optim.Optimizer:
    layer = nn.Linear(2, 2)
    made = torch.optim.Adam(layer.parameters())
    layer(t(1, 2)).sum().backward()
    made.step()
    return made


def object_arrays() -> dict[str, Any]:
    grid = np.empty((2, 2), object)
    grid[0, 0], grid[1, 1] = {"w": t()}, t()
    return {"grid": grid, "one": np.array({"w": t()}, object)}


def quantized() -> nn.Module:
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "qnnpack" if "qnnpack" in engines else "fbgemm"
    made: nn.Module = torch.ao.nn.quantized.Linear(4, 4)
    return made


OBJECTS: dict[str, Callable[[], Any]] = {
    "a module that keeps tensors to itself": Keeper,
    "modules that keep tensors": lambda: nn.Sequential(Keeper(), Keeper()),
    "LSTM": lambda: nn.LSTM(2, 3, 2),
    "GRU": lambda: nn.GRU(2, 3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "quantized": quantized,
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(2, 2)),
    "lazy": lambda: nn.LazyLinear(3),
    "optimizer": optimizer,
    "scheduler": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(), 3),
    "EMA of an LSTM": lambda: torch.optim.swa_utils.AveragedModel(nn.LSTM(2, 2)),
    "partial": lambda: {"f": functools.partial(called, t(), k={"x": t()})},
    "sets": lambda: {"s": {t()}, "f": frozenset([t()])},
    "deque": lambda: {"d": deque([t()], 3)},
    "named tuple": lambda: {"n": Pair(t(), {"q": t()})},
    "a factory that holds a tensor": lambda: {"d": defaultdict(functools.partial(called, t()), {"a": t()})},
    "attributes of a mapping": lambda: with_attribute(Mapped(a=t())),
    "attributes of a list": lambda: with_attribute(Listed([t()])),
    "attributes of a parameter": lambda: attributed(nn.Parameter(t())),
    "attributes of a tensor": lambda: attributed(t()),
    "keys": lambda: {t(): 1, "b": {(t(), 2): 3}},
    "arguments": lambda: {"x": Made()},
    "keyword arguments": lambda: {"x": Keyword()},
    "a state of its own": lambda: {"x": Stateful()},
    "slots": lambda: {"x": Slots()},
    "object arrays": object_arrays,
    "storages by themselves": lambda: {"s": t().untyped_storage(), "typed": t(5).storage()},
    "parameters that know their network": referring,
    "a storage and a tensor over it": lambda: {"s": (whole := t(4)).storage(), "t": whole[:2], "v": whole},
    "a named tuple as the whole": lambda: Pair(t(), 1),
    "a set as the whole": lambda: {t()},
    "sparse and nested": lambda: {"a": t().to_sparse(), "b": torch.nested.nested_tensor([t(2), t(3)])},
}


def saved(path: Path, made: Any, protocol: int = 2) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(made, path, pickle_protocol=protocol)
    return str(path)


def listed(path: str) -> tuple[set[str], set[str]]:
    """The keys of the storages that the pickle refers to, and of those that entries have."""
    with closing(open_checkpoint(path)) as checkpoint:
        graph = checkpoint.document
        assert isinstance(graph, Graph)
        referred = {str(node.pid[2]) for node in graph.persistent if isinstance(node.pid, tuple)}
        reached = {view.storage.key for view in all_strided(checkpoint.tensors) if view.storage is not None}
        return referred, reached & referred


def names(path: str) -> list[str]:
    with closing(open_checkpoint(path)) as checkpoint:
        return [entry.name for entry in checkpoint.entries if isinstance(entry, Tensor)]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", OBJECTS)
def test_every_storage_that_a_pickle_refers_to_is_reached_by_an_entry(kind: str, protocol: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", OBJECTS[kind](), protocol)
    referred, reached = listed(path)
    assert reached == referred
    assert len(names(path)) == len(set(names(path)))


def flipped(path: str, folder: Path) -> Iterator[str]:
    """Copies of a file, each with one other byte in one of its storages."""
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    for number, name in enumerate(records):
        if "/data/" in name and records[name]:
            changed = bytes([records[name][0] ^ 1]) + records[name][1:]
            copy = folder / f"{number}.pt"
            with zipfile.ZipFile(copy, "w") as file:
                for other, content in records.items():
                    file.writestr(other, changed if other == name else content)
            yield str(copy)


@pytest.mark.parametrize("kind", OBJECTS)
def test_one_byte_of_any_storage_changes_the_hash_and_is_a_difference(kind: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", OBJECTS[kind]())
    before = ckpt("hash", path).out
    for copy in flipped(path, tmp_path):
        assert ckpt("hash", copy).out != before
        assert ckpt("diff", path, copy).code == 1


NAMES: dict[str, list[str]] = {
    "LSTM": [f"{name}_l{layer}" for layer in (0, 1) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    + [f"_flat_weights.{number}" for number in range(8)],
    "partial": ["f.args.0", "f.keywords.k.x"],
    "sets": ["s.0", "f.0"],
    "named tuple": ["n.0", "n.1.q"],
    "a factory that holds a tensor": ["d.a", "d.__args__.0.args.0"],
    "attributes of a mapping": ["a", "__dict__.extra.e"],
    "attributes of a list": ["0", "__dict__.extra.e"],
    "keys": ["__keys__.0", "b.__keys__.0.0"],
    "arguments": ["x.0", "x.1.q"],
    "keyword arguments": ["x.__args__.0", "x.__kwargs__.word"],
    "a state of its own": ["x.__state__.0", "x.__state__.1.0.k"],
    "object arrays": ["grid.0.0.w", "grid.1.1", "one.w"],
    "storages by themselves": ["s", "typed"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_tensor_is_called_by_its_place_in_the_object_that_keeps_it(kind: str, tmp_path: Path) -> None:
    assert sorted(names(saved(tmp_path / "m.pt", OBJECTS[kind](), 4))) == sorted(NAMES[kind])


def test_what_a_module_keeps_is_listed_after_what_its_state_dict_has(tmp_path: Path) -> None:
    module = Keeper()
    found = names(saved(tmp_path / "m.pt", module))
    state = list(module.state_dict())
    assert found[: len(state)] == state
    assert {"_defaults.total", "_defaults.deep.0", "_defaults.deep.1.1.z", "_queue.0", "_layers.1.weight"} <= set(found)
    assert not any(name.startswith(("_itself", "_layers.0")) for name in found)  # which are listed by other names


def test_a_private_attribute_that_is_called_as_a_child_has_a_name_of_its_own(tmp_path: Path) -> None:
    module = nn.Module()
    module.add_module("_cache", nn.Linear(1, 1))
    module.__dict__["_cache"] = {"weight": t()}
    assert names(saved(tmp_path / "m.pt", module)) == ["_cache.weight", "_cache.bias", "__dict__._cache.weight"]


def test_objects_that_know_each_other_do_not_multiply(tmp_path: Path) -> None:
    layers = [nn.Linear(1, 1) for _ in range(60)]
    net = nn.Sequential(*layers)
    for index, layer in enumerate(layers):
        layer.__dict__.update(_all=layers, _next=layers[index - 1], _root=[net], _cache={"k": t()})
    found = names(saved(tmp_path / "m.pt", net))
    assert len(found) == 60 * 3
    assert sum(name.endswith("._cache.k") for name in found) == 60


def test_private_containers_that_are_shared_are_opened_once_for_each_object(tmp_path: Path) -> None:
    nested: Any = [t()]
    for _ in range(40):
        nested = {"a": nested, "b": nested}
    module = nn.Linear(1, 1)
    module.__dict__["_deep"] = nested
    assert len(names(saved(tmp_path / "m.pt", module))) == 3


@pytest.mark.parametrize("depth", [5, 40])
def test_private_containers_nest_as_others_do(depth: int, tmp_path: Path) -> None:
    nested: Any = t()
    for _ in range(depth):
        nested = [nested]
    module = nn.Linear(1, 1)
    module.__dict__["_deep"] = nested
    assert names(saved(tmp_path / "m.pt", module))[-1] == "_deep" + ".0" * depth


def test_a_storage_by_itself_is_the_vector_of_its_elements(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.tensor([1.0, 2.0])
    path = saved(tmp_path / "m.pt", {"typed": values.storage(), "bytes": t(2).untyped_storage()})
    assert ckpt("ls", path).out.splitlines() == ["typed\tfloat32\t[2]\t8", "bytes\tuint8\t[8]\t8"]
    assert ckpt("set", path, "typed[1]=5").code == 0
    loaded = torch.load(path, weights_only=False)
    assert loaded["typed"].tolist() == [1.0, 5.0]
