"""The names of rank files of FSDP: which rank wrote a file, of how many, and what it has.

`model_world_size_W_rank_R.pt` with `optim_…` and `extra_state_…` are verl's and SkyRL's,
`pytorch_model_fsdp_0_rankR.bin` with `optimizer_0_rankR.bin` are Accelerate's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, RanksError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.ranks.refused import as_files

MODEL, OPTIMIZER = "model", "optimizer"
"""What the names of the model's entries begin with, and those of its optimizer."""

LATEST = ("latest", "latest_universal")
"""Files that name the folder beside them with the files of ranks, as DeepSpeed writes them."""

_FILES = (
    r"(?P<kind>model|optim|extra_state)_world_size_(?P<world>\d{1,6})_rank_(?P<rank>\d{1,6})\.pt",
    r"(?P<kind>pytorch_model(?:_fsdp)?|optimizer)(?:_(?P<index>\d{1,6}))?_rank_?(?P<rank>\d{1,6})\.bin",
)
_KINDS = {"optim": OPTIMIZER, "optimizer": OPTIMIZER, "extra_state": "extra_state"}
"""By the beginnings of names, what files have; any other is of the model."""


def is_of_ranks(_: str, names: Sequence[str]) -> bool:
    """True for a folder with such files: of a world that they name, or of more than one rank."""
    models = [rank for rank in map(rank_of, names) if rank is not None and rank.kind == MODEL]
    return len(models) > 1 or any(rank.world is not None for rank in models)


def rank_files(names: Sequence[str]) -> frozenset[str]:
    """Return those of the names in a folder that are of rank files; none where it is not a folder of them."""
    found = frozenset(name for name in names if rank_of(name) is not None)
    return found if found and is_of_ranks("", names) else frozenset()


@dataclass(frozen=True, slots=True)
class RankName:
    """What the name of a rank's file says."""

    kind: str
    """`model`, `optimizer` or `extra_state`, with `_N` behind it for the N-th of several."""
    rank: int
    world: int | None
    """The number of ranks, where the name has it."""
    index: int


def rank_of(name: str) -> RankName | None:
    """Return what a name says; None for that of another file."""
    if "_rank" not in name:
        return None
    said = next((found for found in (re.fullmatch(pattern, name) for pattern in _FILES) if found), None)
    if said is None:
        return None
    parts = said.groupdict()
    world = parts.get("world")
    kind = _KINDS.get(parts["kind"], MODEL)
    return RankName(kind, int(parts["rank"]), int(world) if world else None, int(parts.get("index") or 0))


def files_by_kind(path: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the files by what they are of, those of models first, in the order of the ranks.

    Raises RanksError where one of a model is missing.
    """
    ranks = {name: rank for name in names if (rank := rank_of(name)) is not None}
    worlds = {rank.world for rank in ranks.values() if rank.world is not None}
    if len(worlds) > 1:
        raise RanksError(
            f"it has files of saves by {' and by '.join(map(str, sorted(worlds)))} ranks", path=path,
            hint=f"move those of one save elsewhere; {as_files(path)}",
        )  # fmt: skip
    several = any(rank.kind == MODEL and rank.index for rank in ranks.values())
    by_kind: dict[str, dict[int, str]] = {}
    for name, rank in sorted(ranks.items(), key=lambda item: (item[1].kind != MODEL, item[1].kind, item[1].index)):
        kind = f"{rank.kind}_{rank.index}" if several and rank.world is None else rank.kind
        if rank.rank in by_kind.setdefault(kind, {}):
            raise RanksError(f"{name} and {by_kind[kind][rank.rank]} are of one rank", path=path, hint=as_files(path))
        by_kind[kind][rank.rank] = name
    model = next(iter(by_kind.values()))
    world = next(iter(worlds), max(model) + 1)
    if world > limits.SHARDS:
        raise LimitError(f"it is said to be of {world} ranks", path=path)
    found: dict[str, list[str]] = {}
    for kind, there in by_kind.items():
        missing = [rank for rank in range(world) if rank not in there]
        if missing and kind.startswith(MODEL):
            what = f"rank {missing[0]} is" if len(missing) == 1 else f"ranks {listed(missing, 5)} are"
            raise RanksError(
                f"{world - len(missing)} of {world} files of ranks are there: {what} missing", path=path,
                hint=f"fetch the rest; {as_files(path)}",
            )  # fmt: skip
        if not missing:
            found[kind] = [there[rank] for rank in range(world)]
    return found
