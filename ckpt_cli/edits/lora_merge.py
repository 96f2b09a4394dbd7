"""The engine of `lora merge`: the products of LoRA adapters added to the weights of a model, in one pass over these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import field
from math import isfinite
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import DType
from ckpt_cli.edits.convert_contents import plain_view
from ckpt_cli.edits.derive import Derived, DeriveOptions, derive
from ckpt_cli.edits.lora_products import made_storage
from ckpt_cli.edits.lora_targets import Target, Ties, targets_of
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import RefusedError, UsageError, about, some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import is_same
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.changes import Changes, Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.ops.lora import Adapter, adapter_of
from ckpt_cli.ops.match_states import model_tensors

if TYPE_CHECKING:
    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.arrays.low_rank import Merged

MERGE = Verb("merged", "merge")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options of a merge."""

    scale: float = 1.0
    """The number that the effect of every adapter is multiplied by, beside its own."""
    alpha: float | None = None
    """The alpha of adapters that do not say theirs."""
    partial: bool = False
    """True if what the model does not have is left out."""
    untie: bool = False
    """True if a tied tensor that changes gets bytes of its own."""
    keep_tied: bool = False
    """True if what is tied to it changes too."""
    dtype: DType | None = None
    """The new dtype of what changes; None for that of the model."""
    output: DeriveOptions = field(default_factory=DeriveOptions)


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor of the model that an adapter was added to."""

    name: str
    adapter: str
    rank: int
    alpha: float
    scaling: float
    """The number that the product was multiplied by."""
    dora: bool


@dataclass(frozen=True, slots=True)
class Used:
    """An adapter that was merged."""

    path: str
    layout: str
    scale: float


@dataclass(frozen=True, slots=True)
class LoraMerge:
    """The result of a merge, or of its dry run."""

    path: str
    adapters: Sequence[Used]
    merged: Sequence[MergedTensor]
    replaced: Sequence[str]
    """Tensors that an adapter has whole."""
    unmatched: Sequence[str]
    """Names of adapters that the model does not have."""
    warnings: Sequence[str]
    derived: Derived


def merge(path: str, adapters: Sequence[tuple[str, float]], output: str, options: MergeOptions) -> LoraMerge:
    """Write the model `path` with some adapters merged into it as `output`, all or nothing.

    Each adapter has a number that its effect is multiplied by. The products and sums are made in float32, in the order
    of the adapters, and rounded once. Raises RefusedError where names or ties leave open what is meant,
    UnsupportedError for adapters of other kinds, and what `derive` raises.
    """
    if not adapters:
        raise UsageError("name an adapter to merge")
    for scale in (options.scale, *(scale for _, scale in adapters)):
        if not isfinite(scale):
            raise UsageError("a scale is not a finite number")
    with ExitStack() as stack:
        opened = []
        for place, scale in adapters:
            if is_same(place, output):
                raise UsageError("it is an adapter to be merged: name another output", path=output)
            with about(place):
                checkpoint = stack.enter_context(closing(open_checkpoint(place)))
                opened.append((adapter_of(checkpoint, place, options.alpha), scale * options.scale))
        plan = _Plan(opened, options)
        derived = derive(path, output, plan.make, options.output)
    used = [Used(adapter.path, adapter.layout, scale) for adapter, scale in opened]
    return LoraMerge(path, used, plan.merged, plan.replaced, plan.unmatched, [*plan.warnings, *derived.notes], derived)


class _Plan:
    """Plans the merge once the model is open."""

    def __init__(self, adapters: Sequence[tuple[Adapter, float]], options: MergeOptions) -> None:
        from ckpt_cli.arrays.cast import Losses

        self._adapters = adapters
        self._options = options
        self._losses: Losses = Losses()
        self._not_finite: dict[str, None] = {}
        self.merged: list[MergedTensor] = []
        self.replaced: list[str] = []
        self.unmatched: list[str] = []
        self.warnings: list[str] = []

    def make(self, base: Checkpoint) -> EditPlan:
        """Return the plan for the model."""
        prefix, own = model_tensors(base)
        by_name = {tensor.name[len(prefix) :]: tensor for tensor in own}
        targets, self.unmatched = targets_of(base, by_name, self._adapters)
        self._refuse_unmatched(base)
        ties = Ties(base, [target.tensor for target in targets], self._options.untie, self._options.keep_tied)
        self.warnings += ties.warnings
        tensors: dict[str, Tensor] = {}
        contents: dict[Storage, Content] = {}
        for target in targets:
            made = self._made(base, target)
            for tensor in [target.tensor, *ties.follow(target.tensor)]:
                tensors[tensor.name] = _with_shape(plain_view(tensor, made[1], made[0]), target.shape)
            contents[made[0]] = made[2]
        changes = Changes(tensors=tensors, contents=contents)
        return EditPlan(MERGE, tuple(tensors), changes=changes, check=self._check)

    def _refuse_unmatched(self, base: Checkpoint) -> None:
        if self.unmatched and not self._options.partial:
            count = len(self.unmatched)
            raise RefusedError(
                f"the model does not have {count} of the names that the adapter changes",
                path=base.path,
                details=some_of(self.unmatched),
                hint="--partial merges the others",
            )

    def _made(self, base: Checkpoint, target: Target) -> tuple[Storage, DType, Content]:
        """Return the storage with the new elements of a tensor, their dtype, and their content."""
        tensor = target.tensor
        source, start = target.whole or (base, tensor)
        dtype = self._options.dtype or tensor.dtype
        location = tensor.storage.location if tensor.storage is not None else "cpu"
        if target.whole is not None:
            self.replaced.append(tensor.name)
            if start.shape != tensor.shape:
                rows = f"{(tensor.shape or (0,))[0]:,} to {(start.shape or (0,))[0]:,}"
                self.warnings.append(f"{tensor.name} has another number of rows, from {rows}: vocab_size of the config "
                                     "beside the output is still the old one")  # fmt: skip
        for product in target.products:
            low = product.low
            scaling, dora = low.scaling * product.scale, low.magnitude is not None
            self.merged.append(MergedTensor(tensor.name, product.adapter.path, low.rank, low.alpha, scaling, dora))
        Budget.of(source).read(start, Region.of(start))
        storage = made_storage(
            source, start, target.products, dtype, tensor.name, self._note(tensor.name), self._options.output.executor,
            location,
        )  # fmt: skip
        return storage, dtype, content_of(storage)

    def _note(self, name: str) -> Callable[[Any], None]:
        def note(facts: Merged) -> None:
            self._losses.add(facts.losses)
            if not facts.finite:
                self._not_finite[name] = None

        return note

    def _check(self) -> None:
        if self._not_finite:
            raise RefusedError(
                "there are NaN or infinities among the merged values",
                details=some_of(list(self._not_finite)),
                hint="ckpt check --deep says whether the model or an adapter has them",
            )
        if self._losses.infinite:
            raise RefusedError(
                f"{self._losses.infinite:,} finite sums are too large for the new dtype", hint="--dtype float32"
            )


def _with_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a plain view of all of its storage in another shape."""
    if tensor.shape == shape:
        return tensor
    from dataclasses import replace

    from ckpt_cli.model.checkpoint import contiguous_stride

    return replace(tensor, shape=shape, stride=contiguous_stride(shape))
