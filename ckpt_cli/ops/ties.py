"""The engine of `ties`: names that are one tensor, and names that share or repeat bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import NameNotFoundError, UnsupportedError, UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import (
    Group,
    all_named,
    all_strided,
    are_tied,
    by_storage,
    content_digest,
    partly_shared,
    share_bytes,
    spans_used,
    tie_groups,
)
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.ops.select import select_one


@dataclass(frozen=True, slots=True)
class Equals:
    """Tensors that are bit-identical, but stored apart."""

    names: tuple[str, ...]
    nbytes: int
    """Bytes of one of them."""


@dataclass(frozen=True, slots=True)
class Ties:
    """The groups of tensors of a checkpoint that share bytes."""

    path: str
    tied: Sequence[Group]
    """Names of the same view of the same storage; `nbytes` are those of one view."""
    overlapping: Sequence[Group]
    """Different views of one storage that have bytes in common."""
    co_stored: Sequence[Group]
    """Views of one storage that have no byte in common, as flattened RNN weights are."""
    aliases: Mapping[str, str]
    """Names that a container records as aliases of others: {dropped: kept}."""
    equal: Sequence[Equals]
    """Bit-identical tensors stored apart; filled only when asked for, as every byte must be read."""
    claim: str | None
    """The contradictions of a `config.json` beside the file."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """True if two names, or all that lies below two prefixes, are tied."""

    a: str
    b: str
    tied: bool
    reason: str
    """Their relation, in words."""


def find_ties(checkpoint: Checkpoint, *, equal: bool = False) -> Ties:
    """The groups of tied, overlapping and co-stored names; with `equal` also those of equal bytes stored apart."""
    tensors = checkpoint.tensors
    overlapping: list[Group] = []
    co_stored: list[Group] = []
    budget = Budget.of(checkpoint)
    named = all_named(tensors)
    for storage, views in by_storage(named):
        for found, group in zip((overlapping, co_stored), partly_shared(views, budget), strict=True):
            if len(group) > 1:
                found.append(Group(tuple(view.name for view in group), storage.key, spans_used(group)))
    return Ties(
        path=checkpoint.path,
        tied=[_tied_group(group) for group in tie_groups(named)],
        overlapping=overlapping,
        co_stored=co_stored,
        aliases={tensor.name: tensor.alias_of for tensor in tensors if tensor.alias_of is not None},
        equal=_equal_groups(checkpoint, budget) if equal else [],
        claim=_claim(checkpoint),
    )


def _tied_group(group: Sequence[Tensor]) -> Group:
    storage = next((view.storage for view in all_strided(group[:1])), None)
    return Group(tuple(tensor.name for tensor in group), storage.key if storage else "", group[0].nbytes, group[0])


def _equal_groups(checkpoint: Checkpoint, budget: Budget) -> list[Equals]:
    """Tensors of one dtype and shape with the same bytes; tied ones count as one, under the first name."""
    alike: dict[tuple[object, ...], dict[object, Tensor]] = {}
    for tensor in checkpoint.tensors:
        if tensor.layout == "strided" and tensor.view is not None and tensor.dtype.numpy is not None:
            views = alike.setdefault((tensor.dtype.name, tensor.shape, tensor.conj, tensor.neg), {})
            views.setdefault(tensor.view, tensor)
    found: list[Equals] = []
    for views in alike.values():
        if len(views) < 2:
            continue
        by_digest: dict[bytes, list[Tensor]] = {}
        for tensor in views.values():
            budget.read(tensor, Region.of(tensor))
            by_digest.setdefault(content_digest(checkpoint, tensor), []).append(tensor)
        found.extend(
            Equals(tuple(tensor.name for tensor in group), group[0].nbytes)
            for group in by_digest.values()
            if len(group) > 1
        )
    return found


def judge(checkpoint: Checkpoint, a: str, b: str) -> Verdict:
    """True if `a` and `b` are one tensor, or two prefixes with the same tensors below them."""
    below_a, below_b = _below(checkpoint, a), _below(checkpoint, b)
    if "" not in below_a and "" not in below_b and below_a.keys() != below_b.keys():
        odd = next(iter(below_a.keys() ^ below_b.keys()))
        return Verdict(a, b, tied=False, reason=f"not tied: only one of them has {odd}")
    if below_a.keys() != below_b.keys():
        return Verdict(a, b, tied=False, reason="not tied: one is a tensor, the other a prefix")
    for suffix, tensor in below_a.items():
        other = below_b[suffix]
        if tensor is not other and not are_tied(tensor, other):
            reason = _why_not(checkpoint, tensor, other)
            return Verdict(a, b, tied=False, reason=f"not tied: {suffix + ': ' if suffix else ''}{reason}")
    return Verdict(a, b, tied=True, reason="tied: one tensor" if "" in below_a else "tied: the same tensors")


def _below(checkpoint: Checkpoint, argument: str) -> dict[str, Tensor]:
    """The tensors below a prefix by the rest of their name; an exact name has the empty rest."""
    found = select_one(checkpoint, argument)
    if any(selection.index is not None for selection in found):
        raise UsageError("ties compares whole tensors: leave the index out", path=checkpoint.path)
    tensors = [selection.entry for selection in found if isinstance(selection.entry, Tensor)]
    if not tensors:
        raise NameNotFoundError(argument, path=checkpoint.path)
    if found[0].exact:
        return {"": tensors[0]}
    if "*" in argument or "?" in argument:
        raise UsageError("ties compares two names or prefixes, not patterns", path=checkpoint.path)
    return {tensor.name.removeprefix(argument.removesuffix(".") + "."): tensor for tensor in tensors}


def _why_not(checkpoint: Checkpoint, a: Tensor, b: Tensor) -> str:
    """Return the relation of two tensors that are not tied."""
    if (a.parts and a.storage is None) or (b.parts and b.storage is None):
        return "they are not made of the same parts"
    if a.storage is None or b.storage is None:
        return "a tensor without bytes is tied to none"
    if a.storage is b.storage:
        if share_bytes(a, b):
            return "different views that overlap in one storage"
        return "they lie apart in one storage"
    if (a.dtype.name, a.shape) != (b.dtype.name, b.shape):
        return "they differ in dtype or shape"
    if not a.numel:
        return "they are empty"
    budget = Budget.of(checkpoint)
    for tensor in (a, b):
        budget.read(tensor, Region.of(tensor))
    try:
        same = content_digest(checkpoint, a) == content_digest(checkpoint, b)
    except UnsupportedError:
        return "stored apart"
    return "equal values, but stored apart" if same else "different values, stored apart"


# --- what a config.json claims ---------------------------------------------------------------------------------------

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "decoder.weight")
"""The names in Hugging Face's models of the two tensors that `tie_word_embeddings` is about."""


def _claim(checkpoint: Checkpoint) -> str | None:
    """A sentence when the config beside the file ties the embeddings and the file stores them twice."""
    if (config_beside(checkpoint.path) or {}).get("tie_word_embeddings") is not True:
        return None
    return claim_against(checkpoint.tensors)


def claim_against(tensors: Sequence[Tensor]) -> str | None:
    """A sentence when embeddings that a config says are tied are stored twice."""
    embedding, head = embedding_and_head(tensors)
    if embedding is None or head is None or are_tied(embedding, head):
        return None
    return f"config.json says tie_word_embeddings, but {embedding.name} and {head.name} are stored apart"


def embedding_and_head(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The two tensors that `tie_word_embeddings` speaks of, as far as they are there."""
    return _ending(tensors, _EMBEDDINGS), _ending(tensors, _HEADS)


def _ending(tensors: Iterable[Tensor], endings: Sequence[str]) -> Tensor | None:
    return next((t for t in tensors if t.name in endings or t.name.endswith(tuple(f".{e}" for e in endings))), None)
