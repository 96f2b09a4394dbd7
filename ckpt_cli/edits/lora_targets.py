"""The tensors of a model that adapters change: which these are, what is added, and what else has their bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import field
from math import prod

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.edits.lora_products import Product
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError, about, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import all_strided, by_storage, is_array, partly_shared
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.ops.lora import EMBEDDING, FLOATS, Adapter, Low
from ckpt_cli.ops.lora_names import match_names
from ckpt_cli.ops.quantization import Group, groups_text, quantized_groups
from ckpt_cli.ops.ties import embedding_and_head
from ckpt_cli.parallel.tensor_chunks import TensorReader


@dataclass(slots=True)
class Target:
    """A tensor of a model that changes."""

    tensor: Tensor
    whole: tuple[Checkpoint, Tensor] | None = None
    """The tensor of an adapter that takes its place, before something is added."""
    products: list[Product] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it gets."""
        return (self.tensor if self.whole is None else self.whole[1]).shape or ()


def targets_of(
    base: Checkpoint, by_name: Mapping[str, Tensor], adapters: Sequence[tuple[Adapter, float]]
) -> tuple[list[Target], list[str]]:
    """Return the tensors that adapters change, in the order of the model, and the names that it does not have.

    Raises RefusedError for copies of its tensors that are not equal to them, UnsupportedError for shapes that do not
    fit.
    """
    groups = quantized_groups(base.path, base.tensors)
    quantized = {part.name for group in groups for part in group.tensors}
    found: dict[str, Target] = {}
    unmatched: list[str] = []
    for adapter, scale in adapters:
        try:
            matched = match_names(adapter, by_name, base.path)
        except RefusedError:
            _refuse_quantized(base, groups)
            raise
        unmatched += matched.unmatched
        for name, tensor in matched.whole.items():
            _replace(found.setdefault(name, Target(by_name[name])), adapter, tensor, base)
        for name, tensor in matched.copies.items():
            _compare(found.setdefault(name, Target(by_name[name])), adapter, tensor, base)
        for low, name in matched.weights:
            _add(found, by_name, name, low, adapter, scale, quantized, base)
    if unmatched or any(one.tensor.name in quantized for one in found.values()):
        _refuse_quantized(base, groups)
    changed = [one for name in by_name if (one := found.get(name)) is not None and (one.products or one.whole)]
    for one in changed:
        _require_floats(base, one)
    return changed, unmatched


def _add(
    found: dict[str, Target], by_name: Mapping[str, Tensor], name: str, low: Low, adapter: Adapter, scale: float,
    quantized: Collection[str], base: Checkpoint,
) -> None:  # fmt: skip
    """Add the product of a module to its weight, and to its bias."""
    target = found.setdefault(name, Target(by_name[name]))
    if target.tensor.name in quantized:
        target.products.append(Product(adapter, low, scale))
        return
    with about(base.path):
        target.products.append(Product(adapter, low, scale, _is_transposed(low, target, adapter)))
        if low.bias is None:
            return
        bias = f"{name.removesuffix('weight')}bias"
        own = by_name.get(bias)
        if own is None or own.shape != low.bias.shape:
            raise UnsupportedError(f"{low.bias.name!r} of the adapter is for a bias, and {bias!r} is not one for it")
        found.setdefault(bias, Target(own)).products.append(Product(adapter, low, scale, bias=True))


# --- whole tensors ----------------------------------------------------------------------------------------------------


def _replace(target: Target, adapter: Adapter, tensor: Tensor, base: Checkpoint) -> None:
    """Put a tensor of an adapter in the place of the model's, unless it is equal."""
    with about(adapter.path):
        if tensor.layout != "strided" or tensor.dtype.name not in FLOATS or tensor.storage is None:
            raise UnsupportedError(f"tensor {tensor.name!r} of {tensor.dtype} cannot take the place of the model's")
        if tensor.shape == target.tensor.shape:
            if target.tensor.dtype.name in FLOATS and are_equal(base, target.tensor, adapter.checkpoint, tensor):
                return
        elif not _has_other_rows(tensor, target.tensor):
            raise UnsupportedError(
                f"tensor {tensor.name!r} is {list(tensor.shape or ())}, "
                f"and {list(target.tensor.shape or ())} in the model"
            )
        if target.whole is not None:
            raise RefusedError(f"two adapters have the whole of {target.tensor.name!r}")
        target.whole = adapter.checkpoint, tensor


def _has_other_rows(tensor: Tensor, old: Tensor) -> bool:
    """True if two shapes differ in the number of rows only, as those of vocabularies do."""
    return bool(tensor.shape and old.shape) and (tensor.shape or ())[1:] == (old.shape or ())[1:]


def _compare(target: Target, adapter: Adapter, tensor: Tensor, base: Checkpoint) -> None:
    """Look whether an adapter's copy of a weight is that of the model; one with more rows takes its place."""
    if tensor.shape != target.tensor.shape:
        _replace(target, adapter, tensor, base)
    elif target.tensor.dtype.name in FLOATS and not are_equal(base, target.tensor, adapter.checkpoint, tensor):
        raise RefusedError(
            f"the adapter has a copy of {target.tensor.name!r}, which is not equal: it was trained on another model",
            path=adapter.path,
        )


def are_equal(a: Checkpoint, one: Tensor, b: Checkpoint, other: Tensor) -> bool:
    """True if two tensors of floats of one shape have the same values, those of one as the other's dtype has them."""
    from ckpt_cli.arrays.cast import Cast, Losses

    if other.layout != "strided" or other.dtype.name not in FLOATS:
        return False
    for checkpoint, tensor in ((a, one), (b, other)):
        Budget.of(checkpoint).read(tensor, Region.of(tensor))
    readers = [TensorReader(checkpoint, tensor, Region.of(tensor)) for checkpoint, tensor in ((a, one), (b, other))]
    cast = None if one.dtype is other.dtype else Cast(other.dtype, one.dtype, other.name)
    for begin in range(0, one.numel, _COMPARED):
        cut = begin, min(begin + _COMPARED, one.numel)
        first = bytes(readers[0].read_plainly(readers[0].chunk(*cut)))
        second = readers[1].read_plainly(readers[1].chunk(*cut))
        if first != bytes(second if cast is None else cast.run(second, Losses())):
            return False
    return True


_COMPARED = 256 << 10
"""Elements that are compared at a time."""


# --- what else has the bytes ------------------------------------------------------------------------------------------


class Ties:
    """The names that share bytes with tensors that change, and what becomes of them."""

    def __init__(self, base: Checkpoint, changed: Sequence[Tensor], untie: bool, keep_tied: bool) -> None:
        """Raises RefusedError where nobody said whether other names change too."""
        if untie and keep_tied:
            raise UsageError("--untie and --keep-tied exclude each other")
        self.warnings: list[str] = []
        self._following: dict[str, list[Tensor]] = {}
        made = {tensor.name for tensor in changed}
        budget = Budget.of(base)
        for _, views in by_storage(all_strided(base.tensors)):
            if made.isdisjoint(view.name for view in views):
                continue
            for tensor in (view for view in views if view.name in made):
                tied = [view for view in views if view.view == tensor.view and view.name != tensor.name]
                if tied and not untie:
                    self._tied(base, tensor, tied, made, keep_tied)
            overlapping = partly_shared(views, budget)[0]
            if not untie and not made.isdisjoint(view.name for view in overlapping):
                raise RefusedError(
                    f"{listed([view.name for view in overlapping], 3)} share their bytes",
                    path=base.path,
                    hint="--untie gives what changes bytes of its own",
                )
        self._by_config(base, made, keep_tied)

    def follow(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors that change as one of the changed ones does."""
        return self._following.get(tensor.name, [])

    def _tied(
        self, base: Checkpoint, tensor: Tensor, tied: Sequence[Tensor], made: AbstractSet[str], keep_tied: bool
    ) -> None:
        names = listed([view.name for view in tied], 3)
        if keep_tied and made.isdisjoint(view.name for view in tied):
            self._following[tensor.name] = list(tied)
            return
        raise RefusedError(
            f"{tensor.name} is tied to {names}" + (", and both change" if keep_tied else ""),
            path=base.path,
            hint="--untie gives it bytes of its own" + ("" if keep_tied else ", --keep-tied changes both"),
        )

    def _by_config(self, base: Checkpoint, made: AbstractSet[str], keep_tied: bool) -> None:
        """Look at a tie that only the config beside the model says."""
        embedding, head = embedding_and_head(base.tensors)
        config = config_beside(base.container.files[0].path) or {}
        if config.get("tie_word_embeddings") is not True or embedding is None:
            return
        if head is None and embedding.name in made and not keep_tied:
            raise RefusedError(
                f"{embedding.name} is the head of the model too, as config.json ties them",
                path=base.path,
                hint="--keep-tied changes both",
            )
        if head is not None and head.view != embedding.view and made & {head.name, embedding.name}:
            self.warnings.append(
                f"config.json ties {embedding.name} and {head.name}: the model is loaded with one of them"
            )


# --- shapes -----------------------------------------------------------------------------------------------------------


def _is_transposed(low: Low, target: Target, adapter: Adapter) -> bool:
    """Return True where the weight is in × out, so that the factors change places.

    The shapes say so, and of square weights, such as those of GPT-2's Conv1D, the adapter's config. Raises
    UnsupportedError where the shapes do not fit.
    """
    shape = target.shape
    down, up = low.down.shape or (), low.up.shape or ()
    outer, inner = up[0], prod(down[1:])
    if low.kind == EMBEDDING:
        if shape == (inner, outer):
            return True
        if len(shape) == 2 and shape[1] == outer:
            raise UnsupportedError(
                f"{target.tensor.name!r} has {shape[0]:,} rows, and the adapter is for {inner:,}: the vocabulary was "
                "resized before the training"
            )
    elif len(shape) == 2 and prod(down[2:]) == 1:
        is_plain, is_other = shape == (outer, inner), shape == (inner, outer)
        if is_plain or is_other:
            return is_other and (adapter.settings.fan_in_fan_out or not is_plain)
    elif shape[:1] == (outer,) and _is_kernel(shape, down):
        return False
    raise UnsupportedError(
        f"{target.tensor.name!r} is {list(shape)}, and the factors of the adapter are {list(down)} and {list(up)}"
    )


def _is_kernel(shape: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """True if the factor `down` is for the kernels of a convolution; of 1 × 1 also where it is a plain matrix."""
    if len(down) == len(shape):
        return shape[1:] == down[1:]
    return len(down) == 2 and len(shape) > 2 and prod(shape[2:]) == 1 and shape[1] == down[1]


def _require_floats(base: Checkpoint, target: Target) -> None:
    """Raise for a tensor whose elements are not plain floats, and for lengths of DoRA that do not fit it."""
    tensor = target.tensor
    if tensor.layout != "strided" or tensor.dtype.name not in FLOATS or tensor.storage is None or is_array(tensor):
        raise UnsupportedError(f"tensor {tensor.name!r} of {tensor.dtype} cannot be added to", path=base.path)
    for product in target.products:
        magnitude = product.low.magnitude
        if magnitude is None or product.bias:
            continue
        lines = target.shape[1] if product.transposed else target.shape[0]
        if magnitude.numel != lines or magnitude.dtype.name not in FLOATS:
            raise UnsupportedError(
                f"{magnitude.name!r} has {magnitude.numel:,} lengths, for {lines:,} lines of {tensor.name!r}",
                path=product.adapter.path,
            )


def _refuse_quantized(base: Checkpoint, groups: Sequence[Group]) -> None:
    """Raise RefusedError where the model is quantized."""
    if groups:
        raise RefusedError(
            f"the model is quantized ({groups_text(groups)})",
            path=base.path,
            hint="merge into the model with plain floats that it was made of",
        )
