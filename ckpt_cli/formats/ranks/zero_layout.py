"""The layout of a save of DeepSpeed's ZeRO: which files it has, and where in them each parameter lies.

ZeRO keeps a float32 copy of the trained parameters, and the optimizer's states beside it, as flat vectors that the
ranks have parts of (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py; utils/zero_to_fp32.py). In stages 1 and 2 each
group of parameters is one vector, cut into as many parts as there are ranks, with padding at its end. In stage 3 each
parameter is cut: every rank has `ceil(elements / ranks)` of it, in the vectors of its groups, one behind another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from ckpt_cli.errors import RanksError, UnsupportedError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.ranks.model_states import ModelStates
from ckpt_cli.formats.ranks.pieces import Stream, joined_tensor
from ckpt_cli.formats.ranks.rank_file import RankFile, number_of
from ckpt_cli.formats.ranks.refused import as_files, tensor_parallel
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.pickles.tensors.arguments import text_of

FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Keys of the master copies: of stages 1 and 2, and of stage 3."""

_EXPERTS = ("autoep_layers", "ds_autoep_layers")
_EXPERT_FORMATS = ("checkpoint_format", "expert_state_format")
"""Keys of the notes on a layer of experts that say how these are stored (deepspeed/checkpoint/constants.py)."""


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


class ZeroLayout:
    """The files of one save, and the places of its parameters in them."""

    def __init__(self, path: str, models: Sequence[RankFile], optims: Sequence[RankFile], ranks: Sequence[int]) -> None:
        self.path = path
        self.models = models
        self.optims = optims
        self.states = [file.pairs(file.root.get("optimizer_state_dict")) for file in optims]
        self._ranks = ranks
        self._flat = self._key_of_copies()
        self.stage = self._stage_of(self.states[0])
        self._refuse_partial()
        self.world = len(optims)
        self.model_states = ModelStates(path, models, self.stage, self.world)
        self.copies = self.streams(
            [
                [file.vector(f"{self._flat}.{at}", node) for at, node in enumerate(file.items(state[self._flat]))]
                for file, state in zip(optims, self.states, strict=True)
            ],
            self._flat,
        )
        self.parameters = list(self._placed())
        self._check_sums()

    def _key_of_copies(self) -> str:
        for key in FLAT:
            if key in self.states[0]:
                return key
        raise UnsupportedError(
            "its optimizer has no float32 copies of the parameters that could be joined",
            path=self.optims[0].path,
            hint=as_files(self.path),
        )

    def _stage_of(self, state: dict[str, object]) -> int:
        """The stage that a file says or shows; BF16_Optimizer, which works as stage 1, says none."""
        said = number_of(state.get("zero_stage"))
        if said is None:
            said = 3 if FLAT[1] in state else 1
        return said

    def _refuse_partial(self) -> None:
        """Raise where files are missing, of several saves, or of what is spread in another way."""
        counts = self.states[0].get("partition_count")
        several = [number_of(count) for count in self.optims[0].items(counts)]
        if len(set(several)) > 1:
            raise UnsupportedError(
                f"its groups are cut into different numbers of parts ({listed(several, 5)}), as those of experts are",
                path=self.optims[0].path,
                hint=f"DeepSpeed's ds_to_universal.py puts experts together; {as_files(self.path)}",
            )
        world = several[0] if several else number_of(counts)
        world = len(self.optims) if world is None else world
        if len(self._ranks) != world or self._ranks[-1] != world - 1:
            self._refuse_ranks(world)
        if any(number_of(file.root.get("mp_world_size")) not in (None, 1) for file in self.models[:1]):
            raise tensor_parallel(self.models[0].path, self.path)
        for file, state in zip(self.optims, self.states, strict=True):
            if self._flat not in state or self._stage_of(state) != self.stage:
                raise RanksError(
                    f"it is of another save than {self.optims[0].name}: that is of ZeRO stage {self.stage}",
                    path=file.path,
                )
        for file in self.models:
            self._refuse_experts(file)
            self._refuse_other_step(file)

    def _refuse_ranks(self, world: int) -> None:
        missing = sorted(set(range(world)) - set(self._ranks)) if world <= 1 << 20 else []
        if missing:
            what = f"rank {missing[0]} is" if len(missing) == 1 else f"ranks {listed(missing, 5)} are"
            raise RanksError(
                f"{world - len(missing)} of {world} files of ranks are there: {what} missing", path=self.path,
                hint=f"fetch the rest; {as_files(self.path)}",
            )  # fmt: skip
        raise RanksError(
            f"it has files of {len(self._ranks)} ranks, and {self.optims[0].name} says that there were {world}: "
            f"some are of another save",
            path=self.path,
            hint=as_files(self.path),
        )

    def _refuse_experts(self, file: RankFile) -> None:
        for key in _EXPERTS:
            for layer in file.items(file.root.get(key)):
                said = file.pairs(layer)
                if any("partition" in (text_of(said.get(name)) or "") for name in _EXPERT_FORMATS):
                    raise UnsupportedError(
                        "its experts are partitioned over groups of their own (AutoEP)", path=file.path,
                        hint=f"DeepSpeed's ds_to_universal.py puts experts together; {as_files(self.path)}",
                    )  # fmt: skip

    def _refuse_other_step(self, file: RankFile) -> None:
        mine, other = (number_of(each.root.get("global_steps")) for each in (file, self.models[0]))
        if mine != other:
            raise RanksError(f"it is of step {mine}, and {self.models[0].name} of step {other}", path=file.path)

    # --- the flat vectors

    def streams(self, by_rank: Sequence[Sequence[Tensor]], what: str) -> list[list[Stream]]:
        """The streams of each group, made of the vectors that each rank has; raises RanksError for unequal ones."""
        counts = {len(vectors) for vectors in by_rank}
        if len(counts) != 1 or counts == {0}:
            raise RanksError(f"its ranks have {what} of {listed(sorted(counts), 5)} groups", path=self.path)
        if self.stage >= 3:
            return [[Stream(vectors) for vectors in by_rank]]
        return [[Stream(vectors)] for vectors in zip(*by_rank, strict=True)]

    def _placed(self) -> Iterator[Parameter]:
        """The trained parameters with their places."""
        groups = self.model_states.shapes()
        if self.stage >= 3:
            first = 0
            for name, shape in (item for group in groups for item in group.items()):
                each = -(-prod(shape) // self.world)
                yield Parameter(name, shape, 0, first, each)
                first += each
            return
        if len(groups) != len(self.copies):
            raise RanksError(
                f"its parameters are of {len(groups)} groups, their copies of {len(self.copies)}", path=self.path
            )
        optim = self.optims[0]
        gaps = [
            [max(number_of(gap) or 0, 0) for gap in optim.items(group)]
            for group in optim.items(self.states[0].get("param_alignment_paddings"))
        ]
        for number, group in enumerate(groups):
            first = 0
            for at, (name, shape) in enumerate(group.items()):
                gap = gaps[number][at] if number < len(gaps) and at < len(gaps[number]) else 0
                yield Parameter(name, shape, number, first, prod(shape), gap)
                first += prod(shape) + gap

    def _check_sums(self) -> None:
        """Raise where the parameters need other elements than the vectors have, apart from padding."""
        ends, mosts = [0] * len(self.copies), [0] * len(self.copies)
        for parameter in self.parameters:
            ends[parameter.group] = parameter.first + parameter.each
            mosts[parameter.group] = ends[parameter.group] + parameter.gap
        padding = 0 if self.stage >= 3 else 2 * self.world - 1
        for number, (end, most, streams) in enumerate(zip(ends, mosts, self.copies, strict=True)):
            for rank, stream in enumerate(streams):
                if not end <= stream.numel <= most + padding:
                    where = f"rank {rank}" if self.stage >= 3 else f"group {number}"
                    raise RanksError(
                        f"{where} has {stream.numel:,} elements, and its parameters need {end:,}: files or shapes of "
                        f"another save are among them",
                        path=self.path,
                        hint=as_files(self.path),
                    )

    def tensor(self, name: str, parameter: Parameter, streams: Sequence[Stream]) -> Tensor:
        """A tensor that lies in some streams as a parameter does in its own."""
        return joined_tensor(self.path, name, parameter.shape, streams, parameter.first, parameter.each)
