"""The checkpoints of DeepSpeed's ZeRO, stages 1 to 3, and those without it, as the model that was trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ckpt_cli.errors import RanksError
from ckpt_cli.formats.ranks.model_states import OWN, Joined, named_groups
from ckpt_cli.formats.ranks.names import MODEL, OPTIMIZER
from ckpt_cli.formats.ranks.pieces import Stream
from ckpt_cli.formats.ranks.rank_file import RankFile, number_of
from ckpt_cli.formats.ranks.zero_layout import FLAT, ZeroLayout
from ckpt_cli.model.checkpoint import Entry, Tensor

INNER = ("base_optimizer_state", "optimizer_state_dict")
"""Keys of the states of the optimizer that ZeRO wraps: of stages 1 and 2, and of stage 3."""

PLACES = (*FLAT, *INNER, "param_slice_mappings", "group_paddings", "param_alignment_paddings", "partition_count")
"""Keys of an optimizer's file that say where what is."""

_STEP, _STEP_BYTES = "step", 8
"""The key of a state that says how many steps its optimizer took, and the bytes that a number takes at most."""

_STATE_STEPS = 20
"""The cost of making the entry of one parameter's state, in steps of the budget."""


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
    rest = [(key, node) for key, node in model.root.items() if key not in OWN]
    return Joined(model.entries([*module, *rest]), 0, "weights as they are")


class _Run:
    """The files of one save, being joined."""

    def __init__(self, layout: ZeroLayout) -> None:
        self._layout = layout
        self._notes: list[str] = []

    def joined(self) -> Joined:
        """All entries: the model's, the optimizer's, and what else the run saved."""
        layout, states = self._layout, self._layout.model_states
        trained = {
            each.name: replace(layout.tensor(f"{MODEL}.{each.name}", each, layout.copies[each.group]), kind="parameter")
            for each in layout.parameters
        }
        model = states.entries(trained)
        said = f"weights: {layout.copies[0][0].dtype} master copies{states.kept_dtypes(model, trained)}"
        entries = [*model, *self._optimizer(), *states.rest()]
        return Joined(entries, layout.stage, said, tuple(self._notes))

    # --- the optimizer

    def _optimizer(self) -> Iterator[Entry]:
        """The optimizer's states beside the names of their parameters, and its other values."""
        inner = [state.get(INNER[self._layout.stage >= 3]) for state in self._layout.states]
        by_group = [states_of(file, node) for file, node in zip(self._layout.optims, inner, strict=True)]
        self._refuse_other_steps(by_group)
        keys = dict.fromkeys(key for group in by_group[0] for key in group)
        states = [found for key in keys for found in self._state(key, by_group)]
        yield from (entry for _, entry in sorted(states, key=lambda found: found[0]))
        first = self._layout.optims[0]
        groups = first.pairs(inner[0]).get("param_groups")
        rest = [(f"{OPTIMIZER}.param_groups", groups)] if groups is not None else []
        rest += [(f"{OPTIMIZER}.{key}", node) for key, node in self._layout.states[0].items() if key not in PLACES]
        names = [list(shapes) for shapes in self._layout.model_states.shapes()]
        yield from named_groups(first.entries(rest), names)

    def _refuse_other_steps(self, by_group: Sequence[Sequence[dict[str, object]]]) -> None:
        """Raise where the optimizers of two ranks took different numbers of steps: their files are of two saves."""
        first: tuple[bytes, str] | None = None
        for file, groups in zip(self._layout.optims, by_group, strict=True):
            said = _step_of(file, groups[0].get(_STEP) if groups else None)
            if said is None:
                continue
            if first is not None and said != first[0]:
                raise RanksError(
                    f"its optimizer has taken another number of steps than that of {first[1]}: it is of another save",
                    path=file.path,
                )
            first = first or (said, file.name)

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


def states_of(file: RankFile, node: object) -> list[dict[str, object]]:
    """The states of each group: by the numbers of the groups' only parameters, or in a list."""
    found = file.items(node) or list(file.pairs(file.pairs(node).get("state")).values())
    return [file.pairs(group) for group in found]


def _step_of(file: RankFile, node: object) -> bytes | None:
    """Return a number of steps, a number or a tensor of one, as bytes to be compared; None for anything else."""
    number = number_of(node)
    if number is not None:
        return str(number).encode()
    tensor = file.tensor(_STEP, node)
    if tensor is None or tensor.storage is None or tensor.shape not in ((), (1,)) or tensor.nbytes > _STEP_BYTES:
        return None
    return tensor.dtype.name.encode() + tensor.storage.view(tensor.span[0], tensor.nbytes)
