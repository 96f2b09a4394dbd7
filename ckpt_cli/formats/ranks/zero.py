"""The checkpoints of DeepSpeed's ZeRO, stages 1 to 3, and those without it, as the model that was trained.

ZeRO keeps a float32 copy of the trained parameters, and the optimizer's states beside it, as flat vectors that the
ranks have parts of (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py; utils/zero_to_fp32.py). In stages 1 and 2 each
group of parameters is one vector, cut into as many parts as there are ranks, with padding at its end. In stage 3 each
parameter is cut: every rank has `ceil(elements / ranks)` of it, in the vectors of its groups, one behind another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from ckpt_cli.errors import RanksError, UnsupportedError, listed, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.ranks.pieces import JoinedBytes, Stream
from ckpt_cli.formats.ranks.rank_file import RankFile, number_of
from ckpt_cli.model.checkpoint import Entry, Storage, Tensor, contiguous_stride
from ckpt_cli.pickles.tensors.arguments import sizes, text_of

MODEL, OPTIMIZER = "model", "optimizer"
"""What the names of the model's entries begin with, and those of its optimizer."""

FIXED = "its tensors are joined from the files of several ranks, so none can be edited"
"""The reason why a joined checkpoint cannot be edited."""

_OWN = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""Keys of a file of model states whose values become the model's entries."""

_FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Keys of the master copies: of stages 1 and 2, and of stage 3."""

_STATES = ("base_optimizer_state", "optimizer_state_dict")
"""Keys of the states of the optimizer that ZeRO wraps: of stages 1 and 2, and of stage 3."""

_LAYOUT = (*_FLAT, *_STATES, "param_slice_mappings", "group_paddings", "param_alignment_paddings", "partition_count")
"""Keys of an optimizer's file that say where what is."""

_STATE_STEPS = 20
"""The cost of making the entry of one parameter's state, in steps of the budget."""

_EXPERTS = ("autoep_layers", "ds_autoep_layers")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trained parameter, and its place in the flat vectors."""

    name: str
    shape: tuple[int, ...]
    group: int
    """The number of its streams among those of all groups."""
    first: int
    """Its first element in each stream."""
    each: int
    """Elements of it that a stream has at most."""
    gap: int = 0
    """Elements of padding after it."""


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
    return _Run(path, models, optims, ranks).joined() if optims else _whole(models[0])


def _whole(model: RankFile) -> Joined:
    """What one file has that needs no joining."""
    module = [(f"{MODEL}.{key}", node) for key, node in model.pairs(model.root.get("module")).items()]
    if not module:
        raise RanksError("it has no parameters, and there is no file of an optimizer beside it", path=model.path)
    rest = [(key, node) for key, node in model.root.items() if key not in _OWN]
    return Joined(model.entries([*module, *rest]), 0, "weights as they are")


class _Run:
    """The files of one save, being joined."""

    def __init__(self, path: str, models: Sequence[RankFile], optims: Sequence[RankFile], ranks: Sequence[int]) -> None:
        self._path = path
        self._models = models
        self._optims = optims
        self._states = [file.pairs(file.root.get("optimizer_state_dict")) for file in optims]
        self._ranks = ranks
        self._notes: list[str] = []
        self._flat = self._key_of_copies()
        self._stage = self._stage_of(self._states[0])
        self._refuse_partial()
        self._world = len(optims)
        self._copies = self._streams(
            [
                [file.vector(f"{self._flat}.{at}", node) for at, node in enumerate(file.items(state[self._flat]))]
                for file, state in zip(optims, self._states, strict=True)
            ],
            self._flat,
        )
        self._parameters = list(self._placed())
        self._check_sums()

    def _key_of_copies(self) -> str:
        for key in _FLAT:
            if key in self._states[0]:
                return key
        raise UnsupportedError(
            "its optimizer has no float32 copies of the parameters that could be joined",
            path=self._optims[0].path,
            hint=as_files(self._path),
        )

    def _stage_of(self, state: dict[str, object]) -> int:
        """The stage that a file says or shows; BF16_Optimizer, which works as stage 1, says none."""
        said = number_of(state.get("zero_stage"))
        if said is None:
            said = 3 if _FLAT[1] in state else 1
        return said

    def _refuse_partial(self) -> None:
        """Raise where files are missing, of several saves, or of what is spread in another way."""
        counts = self._states[0].get("partition_count")
        several = [number_of(count) for count in self._optims[0].items(counts)]
        if len(set(several)) > 1:
            raise UnsupportedError(
                f"its groups are cut into different numbers of parts ({listed(several, 5)}), as those of experts are",
                path=self._optims[0].path,
                hint=f"DeepSpeed's ds_to_universal.py puts experts together; {as_files(self._path)}",
            )
        world = several[0] if several else number_of(counts)
        world = len(self._optims) if world is None else world
        if len(self._ranks) != world or self._ranks[-1] != world - 1:
            self._refuse_ranks(world)
        if any(number_of(file.root.get("mp_world_size")) not in (None, 1) for file in self._models[:1]):
            raise tensor_parallel(self._models[0].path, self._path)
        for file, state in zip(self._optims, self._states, strict=True):
            if self._flat not in state or self._stage_of(state) != self._stage:
                raise RanksError(
                    f"it is of another save than {self._optims[0].name}: that is of ZeRO stage {self._stage}",
                    path=file.path,
                )
        for file in self._models:
            self._refuse_experts(file)
            self._refuse_other_step(file)

    def _refuse_ranks(self, world: int) -> None:
        missing = sorted(set(range(world)) - set(self._ranks)) if world <= 1 << 20 else []
        if missing:
            what = f"rank {missing[0]} is" if len(missing) == 1 else f"ranks {listed(missing, 5)} are"
            raise RanksError(
                f"{world - len(missing)} of {world} files of ranks are there: {what} missing", path=self._path,
                hint=f"fetch the rest; {as_files(self._path)}",
            )  # fmt: skip
        raise RanksError(
            f"it has files of {len(self._ranks)} ranks, and {self._optims[0].name} says that there were {world}: "
            f"some are of another save",
            path=self._path,
            hint=as_files(self._path),
        )

    def _refuse_experts(self, file: RankFile) -> None:
        for key in _EXPERTS:
            for layer in file.items(file.root.get(key)):
                said = text_of(file.pairs(layer).get("expert_state_format")) or ""
                if "partition" in said:
                    raise UnsupportedError(
                        "its experts are partitioned over groups of their own (AutoEP)", path=file.path,
                        hint=f"DeepSpeed's ds_to_universal.py puts experts together; {as_files(self._path)}",
                    )  # fmt: skip

    def _refuse_other_step(self, file: RankFile) -> None:
        mine, other = (number_of(each.root.get("global_steps")) for each in (file, self._models[0]))
        if mine != other:
            raise RanksError(f"it is of step {mine}, and {self._models[0].name} of step {other}", path=file.path)

    # --- the flat vectors

    def _streams(self, by_rank: Sequence[Sequence[Tensor]], what: str) -> list[list[Stream]]:
        counts = {len(vectors) for vectors in by_rank}
        if len(counts) != 1 or counts == {0}:
            raise RanksError(f"its ranks have {what} of {listed(sorted(counts), 5)} groups", path=self._path)
        if self._stage >= 3:
            return [[Stream(vectors) for vectors in by_rank]]
        return [[Stream(vectors)] for vectors in zip(*by_rank, strict=True)]

    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of the trained parameters by name, a mapping for each group."""
        model = self._models[0]
        said = model.root.get("param_shapes")
        groups = [said] if model.pairs(said) else model.items(said)
        if not groups:
            raise UnsupportedError(
                "it does not say the shapes of the parameters", path=model.path, hint=as_files(self._path)
            )
        return [{name: sizes(name, node) for name, node in model.pairs(group).items()} for group in groups]

    def _placed(self) -> Iterator[Parameter]:
        """The trained parameters with their places."""
        groups = self._shapes()
        if self._stage >= 3:
            first = 0
            for name, shape in (item for group in groups for item in group.items()):
                each = -(-prod(shape) // self._world)
                yield Parameter(name, shape, 0, first, each)
                first += each
            return
        if len(groups) != len(self._copies):
            raise RanksError(
                f"its parameters are of {len(groups)} groups, their copies of {len(self._copies)}", path=self._path
            )
        optim = self._optims[0]
        gaps = [
            [max(number_of(gap) or 0, 0) for gap in optim.items(group)]
            for group in optim.items(self._states[0].get("param_alignment_paddings"))
        ]
        for number, group in enumerate(groups):
            first = 0
            for at, (name, shape) in enumerate(group.items()):
                gap = gaps[number][at] if number < len(gaps) and at < len(gaps[number]) else 0
                yield Parameter(name, shape, number, first, prod(shape), gap)
                first += prod(shape) + gap

    def _check_sums(self) -> None:
        """Raise where the parameters need other elements than the vectors have, apart from padding."""
        ends, mosts = [0] * len(self._copies), [0] * len(self._copies)
        for parameter in self._parameters:
            ends[parameter.group] = parameter.first + parameter.each
            mosts[parameter.group] = ends[parameter.group] + parameter.gap
        padding = 0 if self._stage >= 3 else 2 * self._world - 1
        for number, (end, most, streams) in enumerate(zip(ends, mosts, self._copies, strict=True)):
            for rank, stream in enumerate(streams):
                if not end <= stream.numel <= most + padding:
                    where = f"rank {rank}" if self._stage >= 3 else f"group {number}"
                    raise RanksError(
                        f"{where} has {stream.numel:,} elements, and its parameters need {end:,}: files or shapes of "
                        f"another save are among them",
                        path=self._path,
                        hint=as_files(self._path),
                    )

    def _tensor(self, name: str, parameter: Parameter, streams: Sequence[Stream]) -> Tensor:
        return joined_tensor(self._path, name, parameter.shape, streams, parameter.first, parameter.each)

    # --- entries

    def joined(self) -> Joined:
        """All entries: the model's, the optimizer's, and what else the run saved."""
        model, frozen = self._model()
        rest = [
            (key, node)
            for key, node in self._models[0].root.items()
            if key not in _OWN and not (key == OPTIMIZER and node is None)
        ]
        dtype = self._copies[0][0].dtype
        others = sorted({entry.dtype.name for entry in frozen if isinstance(entry, Tensor)})
        said = f"weights: {dtype} master copies" + (
            f", frozen ones as they are ({listed(others, 3)})" if others else ""
        )
        entries = [*model, *self._optimizer(), *self._models[0].entries(rest)]
        return Joined(entries, self._stage, said, tuple(self._notes))

    def _model(self) -> tuple[list[Entry], list[Entry]]:
        """The model's entries, in the order of the module's state_dict, and those of them that are not trained."""
        trained = {
            each.name: replace(self._tensor(f"{MODEL}.{each.name}", each, self._copies[each.group]), kind="parameter")
            for each in self._parameters
        }
        found: dict[str, Entry] = {**trained, **self._frozen()}
        model = self._models[0]
        buffers = {text_of(name) for name in model.items(model.root.get("buffer_names"))}
        shared = self._shared()
        module = model.pairs(model.root.get("module"))
        for name, node in module.items():
            if name in found or name in shared:
                continue
            for entry in model.entries([(f"{MODEL}.{name}", node)]):
                if isinstance(entry, Tensor) and name in buffers:
                    entry = replace(entry, kind="buffer")
                if name not in buffers and isinstance(entry, Tensor) and not entry.numel and self._stage >= 3:
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
        shared = self._models[0].pairs(self._models[0].root.get("shared_params"))
        return {name: text_of(kept) or "" for name, kept in shared.items()}

    def _frozen(self) -> dict[str, Tensor]:
        """The parameters that are not trained, by name, as they were saved."""
        shapes = self._models[0].pairs(self._models[0].root.get("frozen_param_shapes"))
        if not shapes:
            return {}
        parts = [file.pairs(file.root.get("frozen_param_fragments")) for file in self._models]
        if self._stage >= 3 and len(self._models) != self._world:
            raise RanksError(
                f"{len(self._models)} of {self._world} files of model states are there, and frozen parameters are "
                f"spread over all",
                path=self._path,
            )
        world = self._world if self._stage >= 3 else 1
        return {name: self._frozen_one(name, sizes(name, node), parts[:world]) for name, node in shapes.items()}

    def _frozen_one(self, name: str, shape: tuple[int, ...], parts: Sequence[dict[str, object]]) -> Tensor:
        streams = []
        for file, fragments in zip(self._models, parts, strict=False):
            streams.append(Stream([_flattened(file.vector(f"frozen_param_fragments.{name}", fragments.get(name)))]))
        each = -(-prod(shape) // len(streams))
        if any(stream.numel < each for stream in streams):
            raise RanksError(
                f"frozen parameter {name!r} should have {each:,} elements in each file, {streams[0].numel:,} are there",
                path=self._path,
            )
        return replace(joined_tensor(self._path, f"{MODEL}.{name}", shape, streams, 0, each), kind="parameter")

    # --- the optimizer

    def _optimizer(self) -> Iterator[Entry]:
        """The optimizer's states beside the names of their parameters, and its other values."""
        inner = [state.get(_STATES[self._stage >= 3]) for state in self._states]
        by_group = [_states_of(file, node) for file, node in zip(self._optims, inner, strict=True)]
        keys = dict.fromkeys(key for group in by_group[0] for key in group)
        states = [found for key in keys for found in self._state(key, by_group)]
        yield from (entry for _, entry in sorted(states, key=lambda found: found[0]))
        first = self._optims[0]
        groups = first.pairs(inner[0]).get("param_groups")
        rest = [(f"{OPTIMIZER}.param_groups", groups)] if groups is not None else []
        rest += [(f"{OPTIMIZER}.{key}", node) for key, node in self._states[0].items() if key not in _LAYOUT]
        yield from first.entries(rest)

    def _state(self, key: str, by_group: Sequence[Sequence[dict[str, object]]]) -> Iterator[tuple[int, Entry]]:
        """One state of all parameters, each with the number of its own: cut as it is, or one value for a group."""
        self._models[0].pay(_STATE_STEPS * len(self._parameters))
        streams = self._streams_of_state(key, by_group)
        if streams is not None:
            for place, each in enumerate(self._parameters):
                yield place, self._tensor(f"{OPTIMIZER}.state.{each.name}.{key}", each, streams[each.group])
            return
        if any(self._is_vector(file, groups, key) for file, groups in zip(self._optims, by_group, strict=True)):
            self._notes.append(f"the optimizer's {key} is left out, as its parts do not lie as those of the parameters")
            return
        members: dict[int, list[int]] = {}
        for at, each in enumerate(self._parameters if self._stage < 3 else ()):
            members.setdefault(each.group, []).append(at)
        for number, group in enumerate(by_group[0]):
            named = members.get(number, [])
            places = named or [len(self._parameters) + number]
            names = [f"state.{self._parameters[at].name}.{key}" for at in named] or [f"groups.{number}.{key}"]
            entries = self._optims[0].entries([(f"{OPTIMIZER}.{names[0]}", group[key])]) if key in group else []
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
        for file, groups in zip(self._optims, by_group, strict=True):
            vectors = [file.tensor(key, group.get(key)) for group in groups]
            if any(vector is None or len(vector.shape or ()) != 1 for vector in vectors):
                return None
            by_rank.append([vector for vector in vectors if vector is not None])
        if len({len(vectors) for vectors in by_rank}) != 1 or not by_rank[0]:
            return None
        streams = self._streams(by_rank, key)
        if len(streams) != len(self._copies):
            return None
        return streams if self._is_cut_alike(streams) else None

    def _is_cut_alike(self, streams: Sequence[Sequence[Stream]]) -> bool:
        """True if the parts of all ranks begin where those of the master copies do; padding comes at the end."""
        return all(
            one.fits(other)
            for mine, theirs in zip(streams, self._copies, strict=True)
            for one, other in zip(mine, theirs, strict=True)
        )


def _flattened(tensor: Tensor) -> Tensor:
    """A whole parameter as the vector of its elements, where they stand in a row."""
    return replace(tensor, shape=(tensor.numel,), stride=(1,)) if tensor.is_contiguous else tensor


def _states_of(file: RankFile, node: object) -> list[dict[str, object]]:
    """The states of each group: by the numbers of the groups' only parameters, or in a list."""
    found = file.items(node) or list(file.pairs(file.pairs(node).get("state")).values())
    return [file.pairs(group) for group in found]


def joined_tensor(
    path: str, name: str, shape: tuple[int, ...], streams: Sequence[Stream], first: int, each: int
) -> Tensor:
    """A tensor of which each stream has at most `each` elements, from its element `first` on."""
    dtype, numel = streams[0].dtype, prod(shape)
    storage = Storage(name, dtype.nbytes(numel), "cpu", JoinedBytes(path, streams, first, each, numel))
    return Tensor(name, dtype, shape, contiguous_stride(shape), storage)


def as_files(path: str) -> str:
    """Return the hint that says how to look at the files themselves."""
    return f"ckpt ls --files {quoted(path)} lists the files as they are"


def tensor_parallel(problem_path: str, path: str) -> UnsupportedError:
    """The error for a model whose tensors are cut over ranks in ways that only its code knows."""
    return UnsupportedError(
        "tensor parallel: each rank has a part of some tensors, and no file says along which dimension they are cut",
        path=problem_path,
        hint=f"the model's own tools merge it (Megatron: tools/checkpoint/convert.py); {as_files(path)}",
    )
