"""The files of model states of DeepSpeed: buffers, frozen and tied parameters, and the order of the model's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod

from ckpt_cli.errors import RanksError, UnsupportedError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.ranks.names import MODEL, OPTIMIZER
from ckpt_cli.formats.ranks.pieces import Stream, joined_tensor
from ckpt_cli.formats.ranks.rank_file import RankFile
from ckpt_cli.formats.ranks.refused import as_files
from ckpt_cli.model.checkpoint import Entry, Tensor, Value
from ckpt_cli.pickles.tensors.arguments import sizes, text_of

OWN = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""Keys of a file of model states whose values become the model's entries."""


@dataclass(frozen=True, slots=True)
class Joined:
    """What the files of a folder are together."""

    entries: list[Entry]
    stage: int
    """0 where the files of model states have whole parameters."""
    dtypes: str
    """The dtypes of the weights, in words."""
    notes: tuple[str, ...] = ()
    """What of the files is no entry, a line each."""


class ModelStates:
    """The files of model states of one save, in the order of their ranks."""

    def __init__(self, path: str, files: Sequence[RankFile], stage: int, world: int) -> None:
        """A save by `world` ranks; from stage 3 on each of them has a part of what is not trained."""
        self.path = path
        self.files = files
        self.first = files[0]
        """The file of rank 0, which has what all have, and what only one has."""
        self._cut = stage >= 3
        self._world = world if self._cut else 1

    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Return the shapes of the trained parameters by name, a mapping for each group."""
        model = self.first
        said = model.root.get("param_shapes")
        groups = [said] if model.pairs(said) else model.items(said)
        if not groups:
            raise UnsupportedError(
                "it does not say the shapes of the parameters", path=model.path, hint=as_files(self.path)
            )
        return [{name: sizes(name, node) for name, node in model.pairs(group).items()} for group in groups]

    @cached_property
    def module(self) -> dict[str, object]:
        """The state_dict of the module, whose trained parameters are in half precision, or placeholders."""
        return self.first.pairs(self.first.root.get("module"))

    @cached_property
    def buffers(self) -> frozenset[str]:
        """The names of the buffers."""
        return frozenset(text_of(name) or "" for name in self.first.items(self.first.root.get("buffer_names")))

    @cached_property
    def shared(self) -> dict[str, str]:
        """The names of tied parameters, each with the name under which it was trained; in stage 3 only rank 0 knows."""
        shared = self.first.pairs(self.first.root.get("shared_params"))
        return {name: text_of(kept) or "" for name, kept in shared.items()}

    def entries(self, trained: Mapping[str, Tensor]) -> list[Entry]:
        """Return the model's entries, in the order of the module's state_dict.

        `trained` has the tensors of trained parameters, by their names in the module.
        """
        found: dict[str, Entry] = {**trained, **self._frozen}
        for name, node in self.module.items():
            if name in found or name in self.shared:
                continue
            for entry in self.first.entries([(f"{MODEL}.{name}", node)]):
                if isinstance(entry, Tensor) and name in self.buffers:
                    entry = replace(entry, kind="buffer")
                elif isinstance(entry, Tensor) and not entry.numel and self._cut:
                    continue  # the placeholder of a parameter, whose name nothing has
                found[entry.name.removeprefix(f"{MODEL}.")] = entry
        for name, kept in self.shared.items():
            tensor = found.get(kept)
            if isinstance(tensor, Tensor):
                found[name] = replace(tensor, name=f"{MODEL}.{name}")
        order = {name: place for place, name in enumerate(self.module)}
        return [found[name] for name in sorted(found, key=lambda name: order.get(name, len(order)))]

    def kept_dtypes(self, entries: Sequence[Entry], trained: Mapping[str, Tensor]) -> str:
        """Return the dtypes of those of the model's tensors that are neither trained nor buffers, in words."""
        names = (entry.name.removeprefix(f"{MODEL}.") for entry in entries)
        kept = sorted(
            {
                entry.dtype.name
                for name, entry in zip(names, entries, strict=True)
                if isinstance(entry, Tensor) and name not in (trained.keys() | self.buffers | self.shared.keys())
            }
        )
        return f", frozen ones as they are ({listed(kept, 3)})" if kept else ""

    def rest(self) -> list[Entry]:
        """Return what else the run saved beside the model: its client state, its steps."""
        return self.first.entries(
            (key, node)
            for key, node in self.first.root.items()
            if key not in OWN and not (key == OPTIMIZER and node is None)
        )

    @cached_property
    def _frozen(self) -> dict[str, Tensor]:
        """The parameters that are not trained, by name, as they were saved."""
        shapes = self.first.pairs(self.first.root.get("frozen_param_shapes"))
        if not shapes:
            return {}
        if self._cut and len(self.files) != self._world:
            raise RanksError(
                f"{len(self.files)} of {self._world} files of model states are there, and frozen parameters are spread "
                f"over all",
                path=self.path,
            )
        parts = [file.pairs(file.root.get("frozen_param_fragments")) for file in self.files[: self._world]]
        return {name: self._frozen_one(name, sizes(name, node), parts) for name, node in shapes.items()}

    def _frozen_one(self, name: str, shape: tuple[int, ...], parts: Sequence[dict[str, object]]) -> Tensor:
        streams = []
        for file, fragments in zip(self.files, parts, strict=False):
            streams.append(Stream([_flattened(file.vector(f"frozen_param_fragments.{name}", fragments.get(name)))]))
        each = -(-prod(shape) // len(streams))
        if any(stream.numel < each for stream in streams):
            raise RanksError(
                f"frozen parameter {name!r} should have {each:,} elements in each file, {streams[0].numel:,} are there",
                path=self.path,
            )
        return replace(joined_tensor(self.path, f"{MODEL}.{name}", shape, streams, 0, each), kind="parameter")


def named_groups(entries: Sequence[Entry], names: Sequence[Sequence[str]]) -> Sequence[Entry]:
    """Return the settings of an optimizer, with the names of its parameters as the `params` of each group.

    `names` has those of each group. In the files, each group lists the one vector that its parameters are parts of.
    Nothing is changed where there are not as many groups, as in stage 3, whose vectors are of parts of groups.
    """
    lists = [f"{OPTIMIZER}.param_groups.{number}.params" for number in range(len(names))]
    last = f"{OPTIMIZER}.param_groups.{len(names)}."
    found = {entry.name for entry in entries}
    if not all(each in found for each in lists) or any(entry.name.startswith(last) for entry in entries):
        return entries
    of_group = {name: list(group) for name, group in zip(lists, names, strict=True)}
    return [Value(entry.name, of_group[entry.name]) if entry.name in of_group else entry for entry in entries]


def _flattened(tensor: Tensor) -> Tensor:
    """A whole parameter as the vector of its elements, where they stand in a row."""
    return replace(tensor, shape=(tensor.numel,), stride=(1,)) if tensor.is_contiguous else tensor
