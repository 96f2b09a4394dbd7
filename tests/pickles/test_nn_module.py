"""Whole modules and training checkpoints: names, kinds and values against what torch says of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from torch import nn
from torch.nn.utils import parametrizations, prune

from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, Value

pytestmark = pytest.mark.filterwarnings("ignore:.*(TypedStorage is deprecated|weight_norm|lr_scheduler|Lazy modules)")


class Extra(nn.Module):
    """A module whose state_dict has more than its tensors, made when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> dict[str, int]:
        return {"n": 3}

    def set_extra_state(self, state: Any) -> None:
        """Nothing to do."""


class Restored(nn.Module):
    """A module that has its own say in how it is pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cache = nn.Linear(2, 2), torch.ones(9)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Wrapper(nn.Module):
    """A wrapper such as DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Slotted(nn.Module):
    """A module with a slot beside its dict, which nn.Module does not pickle."""

    __slots__ = ("spare",)

    def __init__(self) -> None:
        super().__init__()
        self.spare = torch.ones(3)
        self.p = nn.Parameter(torch.ones(1))


class Buffers(nn.Module):
    """Buffers of all kinds, a private module, and tensors that are no part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("none", None)
        self.new = nn.Buffer(torch.ones(3))
        self.plain, self._private = torch.ones(4), torch.ones(5)
        self._inner = nn.Linear(1, 1)


def tied() -> nn.Module:
    """One layer in two places."""
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.ReLU(), layer)


def pruned() -> nn.Module:
    """A layer with a mask."""
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


MODULES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), set()),
    "without bias": (lambda: nn.Linear(2, 2, bias=False), set()),
    "frozen": (lambda: nn.Linear(2, 2).requires_grad_(False), set()),
    "tied": (tied, set()),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), {"weight"}),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), {"weight"}),
    "pruned": (pruned, {"weight"}),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()), set()),
    "ParameterList": (lambda: nn.ParameterList([torch.ones(2), torch.ones(3), 5, "s"]), set()),
    "ParameterDict": (lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": torch.ones(1)}), set()),
    "ModuleList": (lambda: nn.ModuleList([nn.Linear(1, 1)]), set()),
    "ModuleDict": (lambda: nn.ModuleDict({"x": nn.Linear(1, 1)}), set()),
    "LSTM": (lambda: nn.LSTM(2, 3, 2), {f"_flat_weights.{number}" for number in range(8)}),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8), set()),
    "EMA": (lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)), set()),
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(1, 2)), set()),
    "wrapped": (lambda: Wrapper(nn.Linear(1, 2)), set()),
    "own state": (Restored, set()),
    "slots": (Slotted, set()),
    "buffers": (Buffers, {"plain", "_private"}),
    "extra state": (Extra, set()),
}
"""Each module, and the tensors of its file that are no part of its state."""


def of(folder: Path, item: Any) -> Checkpoint:
    """What torch saves of something, opened."""
    path = folder / "saved.pt"
    torch.save(item, path)
    return open_checkpoint(str(path))


def values(checkpoint: Checkpoint) -> dict[str, object]:
    """Each entry's value, or the shape of one that is a tensor."""
    return {entry.name: entry.value if isinstance(entry, Value) else entry.shape for entry in checkpoint.entries}


@pytest.mark.parametrize("name", MODULES)
def test_a_whole_module_lists_what_its_state_dict_names(name: str, tmp_path: Path) -> None:
    build, others = MODULES[name]
    module = build()
    mine = {each.name: each for each in of(tmp_path, module).tensors}
    kinds = dict.fromkeys(dict(module.named_parameters(remove_duplicate=False)), "parameter")
    kinds |= dict.fromkeys(dict(module.named_buffers(remove_duplicate=False)), "buffer")
    assert {name: each.kind for name, each in mine.items() if name not in others} == kinds
    assert others <= set(mine)
    state = [key for key in module.state_dict() if not key.endswith("_extra_state")]
    assert [key for key in mine if key in state] == state
    for key, parameter in module.named_parameters():
        assert mine[key].requires_grad is parameter.requires_grad


def test_parametrized_weights_go_by_the_names_of_their_originals(tmp_path: Path) -> None:
    """Such a module cannot be pickled whole; torch says to save its state_dict."""
    state = parametrizations.weight_norm(nn.Linear(2, 2)).state_dict()
    assert [each.name for each in of(tmp_path, state).tensors] == list(state)
    assert "parametrizations.weight.original0" in state


def test_modules_in_containers_go_by_where_they_are(tmp_path: Path) -> None:
    checkpoint = of(
        tmp_path, {"nets": [nn.Linear(1, 1), (nn.Linear(1, 2),)], "deep": {"net": Wrapper(nn.Linear(1, 1))}}
    )
    assert [(each.name, each.kind) for each in checkpoint.tensors] == [
        (f"{prefix}.{leaf}", "parameter")
        for prefix in ("nets.0", "nets.1.0", "deep.net.module")
        for leaf in ("weight", "bias")
    ]


def test_an_extra_state_of_a_state_dict_is_listed(tmp_path: Path) -> None:
    found = values(of(tmp_path, Wrapper(Extra()).state_dict()))
    assert found == {"module.w": (2,), "module._extra_state.n": 3}


def test_set_changes_a_whole_module_in_place(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "net.pt"
    torch.save({"net": Wrapper(tied()), "other": Buffers()}, path)
    done = ckpt("set", path, "net.module.0.weight=7", "other.passing=8", "other._private[0]=9")
    assert (done.code, "net.module.2.weight also changed" in done.err) == (0, True)
    loaded = torch.load(path, weights_only=False)
    assert loaded["net"].module[2].weight.tolist() == [[7, 7], [7, 7]]
    assert loaded["net"].module[2].weight is loaded["net"].module[0].weight
    assert loaded["other"].passing.tolist() == [8, 8]
    assert loaded["other"]._private.tolist() == [9, 1, 1, 1, 1]


# --- what training leaves ---------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.5, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.5),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.5),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.5, centered=True),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.5),
}


def flattened(item: Any, prefix: str = "") -> dict[str, Any]:
    """Names and leaves of a state_dict of dicts and lists, by recursion; lists of plain data are leaves."""
    if isinstance(item, dict) and item:
        pairs = [(str(key), below) for key, below in item.items()]
    elif isinstance(item, list | tuple) and any(
        isinstance(below, dict | list | tuple | torch.Tensor) for below in item
    ):
        pairs = [(str(place), below) for place, below in enumerate(item)]
    else:
        return {prefix: item}
    found: dict[str, Any] = {}
    for key, below in pairs:
        found |= flattened(below, f"{prefix}.{key}" if prefix else key)
    return found


def agrees(folder: Path, item: Any) -> Checkpoint:
    """Compare every entry of a saved thing with the thing."""
    checkpoint = of(folder, item)
    expected = flattened(item)
    assert [entry.name for entry in checkpoint.entries] == list(expected)
    for entry in checkpoint.entries:
        theirs = expected[entry.name]
        if isinstance(entry, Tensor):
            assert torch.equal(torch.from_numpy(values_of(checkpoint, entry).copy()), theirs), entry.name
        else:
            assert entry.value == theirs
    return checkpoint


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_lists_its_state_under_the_numbers_of_its_parameters(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = OPTIMIZERS[name](net.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2)).pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    checkpoint = agrees(tmp_path, {"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    assert "optimizer.param_groups.0.lr" in {entry.name for entry in checkpoint.entries}


def test_a_training_checkpoint_has_schedulers_scalers_and_averages(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    agrees(
        tmp_path,
        {
            "scheduler": scheduler.state_dict(),
            "scaler": {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 0},
            "ema": averaged.state_dict(),
            "rng": torch.get_rng_state(),
            "history": [(0, {"loss": 0.5}), (1, {"loss": (0.25, [torch.ones(2), None])})],
            "best": (None, 1.5),
        },
    )


def test_the_files_beside_a_model_of_the_trainer_are_read(tmp_path: Path) -> None:
    """As transformers' Trainer (`_save_rng_state`, `_save_optimizer_and_scheduler`) writes them."""
    import numpy as np

    rng = {"python": random.Random(0).getstate(), "numpy": np.random.default_rng(0).bit_generator.state,
           "cpu": torch.get_rng_state(), "cuda": [torch.ones(16, dtype=torch.uint8)]}  # fmt: skip
    found = values(of(tmp_path, rng))
    assert found["cpu"] == torch.get_rng_state().shape
    assert found["cuda.0"] == (16,)
    assert found["python.0"] == 3
    assert found["numpy.bit_generator"] == "PCG64"
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=[lambda _: 0.5])
    found = values(of(tmp_path, scheduler.state_dict()))
    assert (found["last_epoch"], found["lr_lambdas"], found["_last_lr"]) == (0, [None], [0.25])


class Arguments:
    """Such as transformers' TrainingArguments, saved as `training_args.bin`."""

    def __init__(self) -> None:
        self.learning_rate, self.output_dir, self.device = 5e-5, "out", torch.device("cpu")
        self.nested = {"bf16": True}


def test_arguments_open_up_to_their_fields(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "training_args.bin"
    torch.save(Arguments(), path)
    found = values(open_checkpoint(str(path)))
    assert (found["learning_rate"], found["output_dir"], found["nested.bf16"]) == (5e-5, "out", True)
    assert ckpt("show", path, "learning_rate").out == "5e-05\n"
