"""The formats that the contract suite runs over: how each is written and read by the library it belongs to.

A new format is one entry in FORMATS with its two functions.
"""

from __future__ import annotations

import atexit
import json
import logging
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import containers
import dcp_formats
import numpy as np
import run_folders
import torch
from safetensors.torch import load_file, save_file
from torch import nn

State = dict[str, torch.Tensor]

_TEMPORARY = tempfile.gettempdir()
"""The folder for temporary ones, also while a test names another one."""


@dataclass(frozen=True)
class Format:
    """One format, as its own library writes and reads it."""

    name: str
    """What `ckpt` calls it."""
    suffix: str
    """Of the file; empty where `write` makes a folder."""
    write: Callable[[State, Path], None]
    read: Callable[[Path], State]
    """The oracle: every name with its tensor, aliases included."""
    keeps_views: bool = True
    """Whether strides and storage offsets survive; where not, tensors are stored contiguously."""
    keeps_ties: bool = True
    """Whether two names of one tensor are still one, be it as an alias."""
    without: tuple[str, ...] = ()
    """Names of the sample that it cannot hold."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """The kinds of those tensors that are told to be parameters or buffers."""
    prefix: str = ""
    """What `ckpt` calls the sample's tensors by, in front of the sample's own names."""
    variant: str = ""
    """What tells two that `ckpt` calls the same apart."""

    @property
    def label(self) -> str:
        """What the tests call it."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def named(self, name: str) -> str:
        """What `ckpt` calls a tensor of the sample, or an index or an assignment of one."""
        return self.prefix + name

    def sample(self) -> State:
        """The sample state, as far as the format can hold it."""
        return {name: tensor for name, tensor in sample().items() if name not in self.without}

    def put(self, path: Path) -> None:
        """Put a copy of the sample in the format at a path: to write it takes up to a second, so it is written once."""
        written = _written(self.label)
        if written.is_dir():
            shutil.copytree(written, path)
        else:
            shutil.copyfile(written, path)


@cache
def _written(label: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ckpt-sample-", dir=_TEMPORARY))
    atexit.register(shutil.rmtree, folder)
    (form,) = (form for form in FORMATS if form.label == label)
    form.write(form.sample(), folder / f"sample{form.suffix}")
    return folder / f"sample{form.suffix}"


def bits(tensor: torch.Tensor) -> bytes:
    """The elements' bytes in row-major order."""
    flat = tensor.detach().resolve_conj().flatten().contiguous()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().tobytes()  # one element has any stride


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file of a folder, by name."""
    return {each.name: each.read_bytes() for each in (sorted(path.iterdir()) if path.is_dir() else [path])}


def sample() -> State:
    """A state of several dtypes and layouts, with a tie, and with an equal tensor stored apart."""
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` also notes the stack for each kind of absent device
    shared = torch.randn(6, 4)
    return {
        "0.weight": shared,
        "0.bias": torch.randn(4).to(torch.bfloat16),
        "2.weight": shared,
        "2.copy": shared.clone(),
        "3.running_mean": torch.randn(5, 2).to(torch.float16),
        "3.scale": torch.randn(4),
        "3.steps": torch.tensor(7),
        "3.mask": torch.tensor([True, False, True]),
        "4.empty": torch.empty(0, 3),
        "4.columns": torch.arange(12).reshape(3, 4).t(),
    }


def _write_zip(state: State, path: Path) -> None:
    torch.save(state, path)


def _read_zip(path: Path) -> State:
    found: State = torch.load(path)
    return found


def _write_safetensors(state: State, path: Path) -> None:
    """Tied names are recorded as `save_model` records them; views are made contiguous."""
    kept: dict[int, str] = {}
    aliases: dict[str, str] = {}
    unique: State = {}
    for name, tensor in state.items():
        first = kept.setdefault(id(tensor), name)
        if first == name:
            unique[name] = tensor.contiguous()
        else:
            aliases[name] = first
    save_file(unique, path, metadata={"format": "pt", **aliases})


def _read_safetensors(path: Path) -> State:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = load_file(path)
    found.update({alias: found[name] for alias, name in metadata.items() if name in found})
    return found


def _sharded(write: Callable[[State, Path], None], stem: str, suffix: str) -> Callable[[State, Path], None]:
    """A writer of two shards and their index; tied tensors stay in one shard, as the hub's writers keep them."""

    def write_set(state: State, folder: Path) -> None:
        folder.mkdir()
        names = list(state)
        halves = [names[:4], names[4:]]
        weight_map = {}
        for number, half in enumerate(halves, start=1):
            shard = f"{stem}-{number:05}-of-00002{suffix}"
            write({name: state[name] for name in half}, folder / shard)
            weight_map.update(dict.fromkeys(half, shard))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))

    return write_set


def _read_shards(read: Callable[[Path], State], suffix: str) -> Callable[[Path], State]:
    def read_set(folder: Path) -> State:
        found: State = {}
        for shard in sorted(folder.glob(f"*{suffix}")):
            found.update(read(shard))
        return found

    return read_set


PARAMETERS = ("0.weight", "0.bias", "2.weight", "2.copy", "3.scale")
"""Those tensors of the sample that `module` makes parameters of."""

KINDS = {name: "parameter" if name in PARAMETERS else "buffer" for name in sample()}
"""What the tensors of the sample are in `module`."""


class Holder(nn.Module):
    """A module that holds others and can be scripted, traced and exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def module(state: State) -> Holder:
    """A module whose state_dict is the sample, ties and views included."""
    whole = Holder()
    parameters: dict[int, nn.Parameter] = {}
    for name, tensor in state.items():
        owner, leaf = name.split(".")
        if owner not in dict(whole.named_children()):
            whole.add_module(owner, Holder())
        below = whole.get_submodule(owner)
        if name in PARAMETERS:
            below.register_parameter(leaf, parameters.setdefault(id(tensor), nn.Parameter(tensor)))
        else:
            below.register_buffer(leaf, tensor)
    return whole


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's word that TorchScript is deprecated and old `.pt2` files are old."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _detached(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor.detach() for name, tensor in state.items()}


def _write_module(state: State, path: Path) -> None:
    torch.save(module(state), path)


def _read_module(path: Path) -> State:
    return _detached(torch.load(path, weights_only=False).state_dict())


def _write_lightning(state: State, path: Path) -> None:
    """The keys of lightning/pytorch/trainer/connectors/checkpoint_connector.py (`dump_checkpoint`)."""
    torch.save(
        {
            "epoch": 3,
            "global_step": 120,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": OrderedDict(state),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_k_models": {}}},
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"width": 8},
        },
        path,
    )


def _read_lightning(path: Path) -> State:
    found: State = torch.load(path)["state_dict"]
    return dict(found)


def _write_torchscript(state: State, path: Path) -> None:
    with quietly():
        torch.jit.save(torch.jit.script(module(state)), path)


def _read_torchscript(path: Path) -> State:
    with quietly():
        return _detached(torch.jit.load(path).state_dict())


def export(state: State) -> torch.export.ExportedProgram:
    """The sample as an exported program."""
    with quietly():
        return torch.export.export(module(state), (torch.ones(2),))


def _write_pt2(state: State, path: Path) -> None:
    exported = export(state)
    with quietly():
        torch.export.save(exported, path)


def _read_pt2(path: Path) -> State:
    with quietly():
        return _detached(torch.export.load(path).state_dict)


def _write_old_pt2(state: State, path: Path) -> None:
    """As torch 2.7's torch/export/__init__.py (`save`) does."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    exported = export(state)
    with quietly():
        made = serialize(exported)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("serialized_exported_program.json", made.exported_program)
        file.writestr("serialized_state_dict.pt", made.state_dict)
        file.writestr("serialized_constants.pt", made.constants)
        file.writestr("serialized_example_inputs.pt", made.example_inputs)
        file.writestr("version", ".".join(map(str, SCHEMA_VERSION)))


write_shards = _sharded(_write_zip, "pytorch_model", ".bin")


def _write_legacy(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def _write_pickle(state: State, path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(state, file, protocol=4)


def _write_arrays(protocol: int) -> Callable[[State, Path], None]:
    """A dict of numpy arrays, tied names one array."""

    def write(state: State, path: Path) -> None:
        arrays = {id(tensor): tensor.numpy() for tensor in state.values()}
        with path.open("wb") as file:
            pickle.dump({name: arrays[id(tensor)] for name, tensor in state.items()}, file, protocol)

    return write


def _read_pickle(path: Path) -> State:
    with path.open("rb") as file:
        found: dict[str, torch.Tensor | np.ndarray] = pickle.load(file)
    made = {id(each): torch.as_tensor(each) for each in found.values()}
    return {name: made[id(each)] for name, each in found.items()}


def _write_npz(state: State, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})


def _read_npz(path: Path) -> State:
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


_TORCH, _SAFE = "pytorch_model.bin", "model.safetensors"

FORMATS = [
    Format("zip", ".pt", _write_zip, _read_zip),
    Format("zip", ".pt", _write_module, _read_module, kinds=KINDS, variant="module"),
    Format("zip", ".ckpt", _write_lightning, _read_lightning, prefix="state_dict.", variant="lightning"),
    Format("torchscript", ".pt", _write_torchscript, _read_torchscript, kinds=KINDS),
    Format("pt2", ".pt2", _write_pt2, _read_pt2, kinds=KINDS),
    Format("pt2", ".pt2", _write_old_pt2, _read_pt2, kinds=KINDS, variant="old"),
    Format("stable-baselines3", ".zip", containers.write_policy, containers.read_sb3, prefix="policy."),
    Format(
        "msgpack", ".msgpack", containers.write_msgpack, containers.read_msgpack, keeps_views=False, keeps_ties=False
    ),
    Format("onnx", ".onnx", containers.write_onnx, containers.read_onnx, keeps_views=False, keeps_ties=False),
    Format("legacy", ".pt", _write_legacy, _read_zip),
    Format("tar", ".pt", containers.write_tar, containers.read_tar),
    Format("pickle", ".pkl", _write_pickle, _read_pickle, variant="torch"),
    Format("pickle", ".pkl", _write_arrays(4), _read_pickle, without=("0.bias",), variant="numpy"),
    Format("pickle", ".pkl", _write_arrays(5), _read_pickle, without=("0.bias",), variant="numpy-5"),
    Format("npz", ".npz", _write_npz, _read_npz, keeps_ties=False, without=("0.bias",)),
    Format("safetensors", ".safetensors", _write_safetensors, _read_safetensors, keeps_views=False),
    Format(
        "shards",
        "",
        write_shards,
        _read_shards(_read_zip, ".bin"),
        variant="zip",
    ),
    Format(
        "shards",
        "",
        _sharded(_write_safetensors, "model", ".safetensors"),
        _read_shards(_read_safetensors, ".safetensors"),
        keeps_views=False,
        variant="safetensors",
    ),
    Format("run", "", *run_folders.of(_write_zip, _read_zip, _TORCH), prefix="model.", variant="zip"),
    Format(
        "run",
        "",
        *run_folders.of(_write_safetensors, _read_safetensors, _SAFE),
        False,
        prefix="model.",
        variant="safetensors",
    ),
    Format("dcp", "", dcp_formats.save, dcp_formats.read, keeps_views=False, keeps_ties=False),
    Format(
        "dcp",
        "",
        dcp_formats.save_safetensors,
        dcp_formats.read_safetensors,
        keeps_views=False,
        keeps_ties=False,
        variant="safetensors",
    ),
    Format("dcp", "", dcp_formats.save_ranks, dcp_formats.read, keeps_views=False, keeps_ties=False, variant="ranks"),
]
