"""The checkpoints of DeepSpeed's ZeRO, stages 1 to 3, and those without it, as the model that was trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from ckpt_cli.errors import RanksError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.ranks.pieces import Stream
from ckpt_cli.formats.ranks.rank_file import RankFile
from ckpt_cli.formats.ranks.zero_layout import FLAT, MODEL, OPTIMIZER, ZeroLayout, joined_tensor
from ckpt_cli.model.checkpoint import Entry, Tensor
from ckpt_cli.pickles.tensors.arguments import sizes, text_of

_OWN = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""Keys of a file of model states whose values become the model's entries."""

_STATES = ("base_optimizer_state", "optimizer_state_dict")
"""Keys of the states of the optimizer that ZeRO wraps: of stages 1 and 2, and of stage 3."""

_PLACES = (*FLAT, *_STATES, "param_slice_mappings", "group_paddings", "param_alignment_paddings", "partition_count")
"""Keys of an optimizer's file that say where what is."""

_STATE_STEPS = 20
"""The cost of making the entry of one parameter's state, in steps of the budget."""


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


def join_zero(path: str, models: Sequence[RankFile], optims: Sequence[RankFile], ranks: Sequence[int]) -> Joined:
    """Return the model whose parts some files have; `ranks` are those of the optimizer's files, which come in order.

    Raises RanksError where files are missing or do not fit together, UnsupportedError for what is cut another way.
    """
    if not models:
        raise RanksError("there is no file of model states beside those of the optimizer", path=path)
    if not optims:
        return _whole(models[0])
    return _Run(ZeroLayout(path, models, optims, ranks)).joined()


def _whole(model: RankFile) -> Joined:
    """What one file has that needs no joining; raises RanksError for one that has placeholders of what others have."""
    shapes = model.items(model.root.get("param_shapes")) if "zero_pp_rank" in model.name else ()
    if shapes:
        raise RanksError(
            "the files of optimizer states are missing, and of ZeRO stage 3 only these have the trained parameters",
            path=model.path,
        )
    module = [(f"{MODEL}.{key}", node) for key, node in model.pairs(model.root.get("module")).items()]
    if not module:
        raise RanksError("it has no parameters, and there is no file of an optimizer beside it", path=model.path)
    rest = [(key, node) for key, node in model.root.items() if key not in _OWN]
    return Joined(model.entries([*module, *rest]), 0, "weights as they are")


class _Run:
    """The files of one save, being joined."""

    def __init__(self, layout: ZeroLayout) -> None:
        self._layout = layout
        self._notes: list[str] = []

    def joined(self) -> Joined:
        """All entries: the model's, the optimizer's, and what else the run saved."""
        model, frozen = self._model()
        rest = [
            (key, node)
            for key, node in self._layout.models[0].root.items()
            if key not in _OWN and not (key == OPTIMIZER and node is None)
        ]
        dtype = self._layout.copies[0][0].dtype
        others = sorted({entry.dtype.name for entry in frozen if isinstance(entry, Tensor)})
        said = f"weights: {dtype} master copies" + (
            f", frozen ones as they are ({listed(others, 3)})" if others else ""
        )
        entries = [*model, *self._optimizer(), *self._layout.models[0].entries(rest)]
        return Joined(entries, self._layout.stage, said, tuple(self._notes))

    def _model(self) -> tuple[list[Entry], list[Entry]]:
        """The model's entries, in the order of the module's state_dict, and those of them that are not trained."""
        layout = self._layout
        trained = {
            each.name: replace(layout.tensor(f"{MODEL}.{each.name}", each, layout.copies[each.group]), kind="parameter")
            for each in layout.parameters
        }
        found: dict[str, Entry] = {**trained, **self._frozen()}
        model = self._layout.models[0]
        buffers = {text_of(name) for name in model.items(model.root.get("buffer_names"))}
        shared = self._shared()
        module = model.pairs(model.root.get("module"))
        for name, node in module.items():
            if name in found or name in shared:
                continue
            for entry in model.entries([(f"{MODEL}.{name}", node)]):
                if isinstance(entry, Tensor) and name in buffers:
                    entry = replace(entry, kind="buffer")
                if name not in buffers and isinstance(entry, Tensor) and not entry.numel and self._layout.stage >= 3:
                    continue  # the placeholder of a parameter, whose name nothing has
                found[entry.name.removeprefix(f"{MODEL}.")] = entry
        for name, kept in shared.items():
            tensor = found.get(kept)
            if isinstance(tensor, Tensor):
                found[name] = replace(tensor, name=f"{MODEL}.{name}")
        order = {name: place for place, name in enumerate(module)}
        ordered = sorted(found, key=lambda name: order.get(name, len(order)))
        frozen = [found[name] for name in found if name not in trained and name not in buffers and name not in shared]
        return [found[name] for name in ordered], frozen

    def _shared(self) -> dict[str, str]:
        """The names of tied parameters, each with the name under which it was trained; in stage 3 only rank 0 knows."""
        shared = self._layout.models[0].pairs(self._layout.models[0].root.get("shared_params"))
        return {name: text_of(kept) or "" for name, kept in shared.items()}

    def _frozen(self) -> dict[str, Tensor]:
        """The parameters that are not trained, by name, as they were saved."""
        shapes = self._layout.models[0].pairs(self._layout.models[0].root.get("frozen_param_shapes"))
        if not shapes:
            return {}
        parts = [file.pairs(file.root.get("frozen_param_fragments")) for file in self._layout.models]
        there, world = len(self._layout.models), self._layout.world
        if self._layout.stage >= 3 and there != world:
            raise RanksError(
                f"{there} of {world} files of model states are there, and frozen parameters are spread over all",
                path=self._layout.path,
            )
        world = self._layout.world if self._layout.stage >= 3 else 1
        return {name: self._frozen_one(name, sizes(name, node), parts[:world]) for name, node in shapes.items()}

    def _frozen_one(self, name: str, shape: tuple[int, ...], parts: Sequence[dict[str, object]]) -> Tensor:
        streams = []
        for file, fragments in zip(self._layout.models, parts, strict=False):
            streams.append(Stream([_flattened(file.vector(f"frozen_param_fragments.{name}", fragments.get(name)))]))
        each = -(-prod(shape) // len(streams))
        if any(stream.numel < each for stream in streams):
            raise RanksError(
                f"frozen parameter {name!r} should have {each:,} elements in each file, {streams[0].numel:,} are there",
                path=self._layout.path,
            )
        return replace(joined_tensor(self._layout.path, f"{MODEL}.{name}", shape, streams, 0, each), kind="parameter")

    # --- the optimizer

    def _optimizer(self) -> Iterator[Entry]:
        """The optimizer's states beside the names of their parameters, and its other values."""
        inner = [state.get(_STATES[self._layout.stage >= 3]) for state in self._layout.states]
        by_group = [_states_of(file, node) for file, node in zip(self._layout.optims, inner, strict=True)]
        keys = dict.fromkeys(key for group in by_group[0] for key in group)
        states = [found for key in keys for found in self._state(key, by_group)]
        yield from (entry for _, entry in sorted(states, key=lambda found: found[0]))
        first = self._layout.optims[0]
        groups = first.pairs(inner[0]).get("param_groups")
        rest = [(f"{OPTIMIZER}.param_groups", groups)] if groups is not None else []
        rest += [(f"{OPTIMIZER}.{key}", node) for key, node in self._layout.states[0].items() if key not in _PLACES]
        yield from first.entries(rest)

    def _state(self, key: str, by_group: Sequence[Sequence[dict[str, object]]]) -> Iterator[tuple[int, Entry]]:
        """One state of all parameters, each with the number of its own: cut as it is, or one value for a group."""
        self._layout.models[0].pay(_STATE_STEPS * len(self._layout.parameters))
        streams = self._streams_of_state(key, by_group)
        if streams is not None:
            for place, each in enumerate(self._layout.parameters):
                yield place, self._layout.tensor(f"{OPTIMIZER}.state.{each.name}.{key}", each, streams[each.group])
            return
        if any(self._is_vector(file, groups, key) for file, groups in zip(self._layout.optims, by_group, strict=True)):
            self._notes.append(f"the optimizer's {key} is left out, as its parts do not lie as those of the parameters")
            return
        members: dict[int, list[int]] = {}
        for at, each in enumerate(self._layout.parameters if self._layout.stage < 3 else ()):
            members.setdefault(each.group, []).append(at)
        for number, group in enumerate(by_group[0]):
            named = members.get(number, [])
            places = named or [len(self._layout.parameters) + number]
            names = [f"state.{self._layout.parameters[at].name}.{key}" for at in named] or [f"groups.{number}.{key}"]
            entries = self._layout.optims[0].entries([(f"{OPTIMIZER}.{names[0]}", group[key])]) if key in group else []
            yield from ((places[0], entry) for entry in entries)
            if len(entries) == 1:
                for place, name in zip(places[1:], names[1:], strict=True):
                    yield place, replace(entries[0], name=f"{OPTIMIZER}.{name}")

    def _is_vector(self, file: RankFile, groups: Sequence[dict[str, object]], key: str) -> bool:
        """True if a rank has something with dimensions for a state, and so perhaps a part of it."""
        tensors = [file.tensor(key, group.get(key)) for group in groups]
        return any(tensor is not None and bool(tensor.shape) for tensor in tensors)

    def _streams_of_state(self, key: str, by_group: Sequence[Sequence[dict[str, object]]]) -> list[list[Stream]] | None:
        """The streams of a state that is cut as the parameters are; None for any other."""
        by_rank: list[list[Tensor]] = []
        for file, groups in zip(self._layout.optims, by_group, strict=True):
            vectors = [file.tensor(key, group.get(key)) for group in groups]
            if any(vector is None or len(vector.shape or ()) != 1 for vector in vectors):
                return None
            by_rank.append([vector for vector in vectors if vector is not None])
        if len({len(vectors) for vectors in by_rank}) != 1 or not by_rank[0]:
            return None
        streams = self._layout.streams(by_rank, key)
        if len(streams) != len(self._layout.copies):
            return None
        return streams if self._is_cut_alike(streams) else None

    def _is_cut_alike(self, streams: Sequence[Sequence[Stream]]) -> bool:
        """True if the parts of all ranks begin where those of the master copies do; padding comes at the end."""
        return all(
            one.fits(other)
            for mine, theirs in zip(streams, self._layout.copies, strict=True)
            for one, other in zip(mine, theirs, strict=True)
        )


def _flattened(tensor: Tensor) -> Tensor:
    """A whole parameter as the vector of its elements, where they stand in a row."""
    return replace(tensor, shape=(tensor.numel,), stride=(1,)) if tensor.is_contiguous else tensor


def _states_of(file: RankFile, node: object) -> list[dict[str, object]]:
    """The states of each group: by the numbers of the groups' only parameters, or in a list."""
    found = file.items(node) or list(file.pairs(file.pairs(node).get("state")).values())
    return [file.pairs(group) for group in found]
