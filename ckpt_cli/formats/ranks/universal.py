"""Universal checkpoints of DeepSpeed: a folder for each parameter, with a file for it and for each of its states.

`ds_to_universal.py` writes `zero/NAME/fp32.pt`, `exp_avg.pt`, `exp_avg_sq.pt` and `step.pt`, and
`zero/optimizer_state.pt` (deepspeed/checkpoint/ds_to_universal.py). From ZeRO stages 1 and 2 a file is a dict with the
tensor as `param`, from stage 3 it is the vector of its elements. The files of model states stay as they were. Below
`zero/` there are also float32 copies of frozen and tied parameters and of buffers, made of half precision or integers;
these are read from the model states instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from ckpt_cli.errors import MalformedError, RanksError, listed
from ckpt_cli.formats.ranks.model_states import Joined, ModelStates, named_groups
from ckpt_cli.formats.ranks.names import MODEL, OPTIMIZER
from ckpt_cli.formats.ranks.rank_file import RankFile
from ckpt_cli.formats.ranks.refused import as_files, tensor_parallel
from ckpt_cli.formats.ranks.zero import INNER, PLACES, states_of
from ckpt_cli.model.checkpoint import Entry, Tensor, contiguous_stride

FOLDER = "zero"
"""The folder of the parameters' folders."""

OTHERS = "optimizer_state.pt"
"""The file in it with what else the optimizer has."""

_MASTER, _PARAM = "fp32", "param"

Shape = tuple[int, ...]


def join_universal(path: str, models: Sequence[RankFile], saved: Mapping[str, RankFile]) -> Joined:
    """Return the model of some files of model states and of the files below `zero/`, by their names there.

    Raises RanksError where one is missing or has another shape.
    """
    return _Universal(path, models, saved).joined()


class _Universal:
    """The files of one checkpoint, being joined."""

    def __init__(self, path: str, models: Sequence[RankFile], saved: Mapping[str, RankFile]) -> None:
        self._path = path
        self._others = saved.get(OTHERS)
        self._files: dict[str, dict[str, RankFile]] = {}
        """By the name of a parameter, its files by what they have: `fp32`, `exp_avg`, `step`."""
        for name, file in saved.items():
            parameter, slash, key = name.rpartition("/")
            if slash:
                self._files.setdefault(parameter, {})[key.removesuffix(".pt")] = file
        stage = 3 if "zero_pp_rank" in models[0].name else 2
        self._states = ModelStates(path, models, stage, len(models))
        self._is_sliced = any(not file.name.endswith("mp_rank_00_model_states.pt") for file in models)
        """True if it was trained by ranks that had parts of parameters, or of the model, to themselves."""
        apart = models[:1] if stage >= 3 else models  # of stage 3 there is a file for each data parallel rank
        self._groups = [shapes for file in apart for shapes in ModelStates(path, [file], stage, 1).shapes()]

    def joined(self) -> Joined:
        """All entries: the model's, the optimizer's, and what else the run saved."""
        states = self._states
        shapes: dict[str, Shape] = {}
        for group in self._groups:
            shapes.update(group)
        trained = {name: self._master(name, shape) for name, shape in shapes.items()}
        known = trained.keys() | states.module.keys() | states.shared.keys()
        more = [name for name in self._files if name not in known and _MASTER in self._files[name]]
        trained.update((name, self._master(name, None)) for name in more)  # experts that were put together
        self._refuse_slices(trained)
        model = states.entries(trained)
        dtypes = listed(sorted({tensor.dtype.name for tensor in trained.values()}), 3)
        said = f"weights: {dtypes} master copies{states.kept_dtypes(model, trained)}"
        entries = [*model, *self._optimizer(trained), *states.rest()]
        return Joined(entries, 3, said)

    def _refuse_slices(self, trained: Mapping[str, Tensor]) -> None:
        """Raise for a model of tensor parallel ranks of which something that was not put together is to be joined."""
        states = self._states
        cut = [name for name in states.module if name not in (trained.keys() | states.buffers | states.shared.keys())]
        if cut and self._is_sliced:
            raise tensor_parallel(states.first.path, self._path)

    def _master(self, name: str, shape: Shape | None) -> Tensor:
        """The master copy of a parameter."""
        file = self._files.get(name, {}).get(_MASTER)
        if file is None:
            raise RanksError(
                f"{FOLDER}/{name}/{_MASTER}.pt is missing",
                path=self._path,
                hint=f"fetch it, or write the checkpoint again by ds_to_universal.py; {as_files(self._path)}",
            )
        tensor = self._tensor(f"{MODEL}.{name}", file, shape)
        if tensor is None:
            raise MalformedError("it has no tensor, nor a dict with one as 'param'", path=file.path)
        return replace(tensor, kind="parameter")

    def _tensor(self, name: str, file: RankFile, shape: Shape | None) -> Tensor | None:
        """The tensor that a file has, in a shape that it may have lost; None where it has none."""
        tensor = file.tensor(name, file.root.get(_PARAM, file.graph.root))
        if tensor is None or tensor.shape is None or tensor.layout != "strided":
            return None
        if _PARAM in file.root or shape is None or tensor.shape == shape:  # as it says itself
            return tensor
        if len(tensor.shape) != 1 or tensor.numel != prod(shape) or not tensor.is_contiguous:
            raise RanksError(
                f"it is of shape {list(tensor.shape)}, and its parameter of {list(shape)}: it is of another save",
                path=file.path,
                hint=as_files(self._path),
            )
        return replace(tensor, shape=shape, stride=contiguous_stride(shape))

    def _optimizer(self, trained: Mapping[str, Tensor]) -> Iterator[Entry]:
        """The optimizer's states beside the names of their parameters, and its other values."""
        for name, master in trained.items():
            for key, file in self._files[name].items():
                if key == _MASTER:
                    continue
                entry = f"{OPTIMIZER}.state.{name}.{key}"
                tensor = self._tensor(entry, file, master.shape) if key != "step" else None
                yield from [tensor] if tensor is not None else file.entries([(entry, file.graph.root)])
        others = self._others
        if others is None:
            return
        inner = others.root.get(INNER[1])
        for number, group in enumerate(states_of(others, inner)):  # of stage 3, where no parameter has a step
            for key, node in group.items():
                tensor = others.tensor(key, node)
                if tensor is None or not tensor.shape:
                    yield from others.entries([(f"{OPTIMIZER}.groups.{number}.{key}", node)])
        rest = {key: node for key, node in others.root.items() if key not in PLACES}
        settings = others.entries((f"{OPTIMIZER}.{key}", node) for key, node in rest.items())
        yield from named_groups(settings, [list(group) for group in self._groups])
