"""The parameters that the states of an optimizer belong to, and how that is known: by name, by shape, or by order.

torch.optim numbers its parameters in the order of its groups, and does not say which is which. Names in the file prove
it; so do shapes, where only one assignment fits. An order under which every shape fits is a hypothesis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ckpt_cli.facts import dataclass
from ckpt_cli.formats.runs.read import model_of
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.match_states import model_part
from ckpt_cli.ops.optimizer_states import Optimizer, Shape, Slot, optimizers_of
from ckpt_cli.ops.parts import is_buffer, roles_of
from ckpt_cli.pickles.graph import Graph

KNOWN = ("named", "unique")
"""The pairings that the file itself proves."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that wrappers of modules add anywhere (torch.compile, FSDP, activation checkpointing)."""

_OUTER = "module"
"""The first part of names that DistributedDataParallel adds."""

_SCOPES = 64
"""Containers in which the names that an optimizer has are looked for."""

_SAMPLE = 1000
"""Names of which one must be in a container, or no more of them are looked for there."""

_TRAINABLE = ", trainable only"


@dataclass(frozen=True, slots=True)
class Scope:
    """The tensors of a model, or of a part of one, that may be parameters."""

    prefix: str
    """The name that theirs begin with; empty for the whole checkpoint."""
    named: Mapping[str, Tensor]
    """All of them, and whatever else lies there, by their names without the prefix."""
    candidates: Sequence[Tensor]
    """Those that an optimizer may have, in the file's order; tied ones once, by the first name."""
    is_ordered: bool
    """True if the file keeps the order in which the module has them."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """The parameters of one optimizer beside those of the model."""

    optimizer: Optimizer
    scope: Scope
    pairs: Sequence[tuple[Slot, Tensor | None]] = ()
    """Each of its parameters, with the tensor that it is; None for all where no pairing is known."""
    how: str | None = None
    """`named`, `unique`, `order`, or None where nothing says it."""
    hypothesis: str | None = None
    """For `order`, the order under which all shapes fit."""
    reason: str = ""
    """The reason why there is no pairing."""

    @property
    def unmatched(self) -> Sequence[Slot]:
        """The optimizer's parameters that are paired with none of the model's."""
        return [slot for slot, tensor in self.pairs if tensor is None]

    @property
    def left(self) -> Sequence[Tensor]:
        """The tensors that may be parameters, and are paired with none of the optimizer's."""
        paired = {tensor.view or id(tensor) for _, tensor in self.pairs if tensor is not None}
        return [tensor for tensor in self.scope.candidates if (tensor.view or id(tensor)) not in paired]

    def is_in_scope(self, tensor: Tensor) -> bool:
        """True for a tensor of the same model."""
        return not self.scope.prefix or tensor.name.startswith(f"{self.scope.prefix}.")

    def name_of(self, tensor: Tensor) -> str:
        """Return the name of a parameter without the prefix of the model."""
        return tensor.name[len(self.scope.prefix) + 1 :] if self.scope.prefix else tensor.name


def pairings_of(checkpoint: Checkpoint, model: Checkpoint | None = None) -> list[Pairing]:
    """Return the pairing of each optimizer of a checkpoint with the parameters there, or with those of another file."""
    optimizers = optimizers_of(checkpoint)
    if not optimizers:
        return []
    scopes = scopes_of(checkpoint if model is None else model)
    return [_pairing(optimizer, scopes) for optimizer in optimizers]


# --- what may be a parameter ------------------------------------------------------------------------------------------


def scopes_of(checkpoint: Checkpoint) -> list[Scope]:
    """Return where parameters may stand: in the model, then in other containers, and in the parts of the model."""
    found = [
        tensor
        for tensor, (role, _) in zip(checkpoint.tensors, roles_of(checkpoint), strict=True)
        if role == "model" and tensor.holder is None
    ]
    is_ordered = _keeps_order(checkpoint)
    main = checkpoint.weights or model_part(checkpoint)
    inside = f"{main}." if main else ""
    prefixes = {main: None}
    for tensor in found:
        if inside and tensor.name.startswith(inside):
            rest = tensor.name[len(inside) :]
            if "." in rest:
                prefixes[inside + rest.partition(".")[0]] = None
        elif "." in tensor.name:
            prefixes[tensor.name.partition(".")[0]] = None
    below: dict[str, list[Tensor]] = {prefix: [] for prefix in prefixes}
    for tensor in found:
        first, _, rest = tensor.name.partition(".")
        keys = [main] if tensor.name.startswith(inside) else []
        if keys and inside:
            keys.append(inside + tensor.name[len(inside) :].partition(".")[0])
        else:
            keys.append(first)
        for key in keys:
            if key in below and (not key or tensor.name.startswith(f"{key}.")):
                below[key].append(tensor)
    return [_scope(prefix, tensors, is_ordered) for prefix, tensors in below.items() if tensors or prefix == main]


def _keeps_order(checkpoint: Checkpoint) -> bool:
    """True if tensors stand in the order of the module, as in pickles, also joined ones; other formats sort names."""
    model = model_of(checkpoint)
    return isinstance(model.document, Graph) or (model.fixed != "" and model.weights != "")


def _scope(prefix: str, tensors: Sequence[Tensor], is_ordered: bool) -> Scope:
    at = len(prefix) + 1 if prefix else 0
    named = {tensor.name[at:]: tensor for tensor in reversed(tensors)}
    declared = any(tensor.kind == "parameter" for tensor in tensors)
    candidates: dict[object, Tensor] = {}
    for tensor in tensors:
        if may_be_parameter(tensor) and (not declared or tensor.kind == "parameter"):
            candidates.setdefault(tensor.view or id(tensor), tensor)
    return Scope(prefix, named, list(candidates.values()), is_ordered)


def may_be_parameter(tensor: Tensor) -> bool:
    """True for a tensor that an optimizer may have: floating or complex, and not known to be a buffer."""
    return tensor.dtype.category in ("float", "complex") and not is_buffer(tensor) and tensor.alias_of is None


# --- the ladder of proofs ---------------------------------------------------------------------------------------------


def _pairing(optimizer: Optimizer, scopes: Sequence[Scope]) -> Pairing:
    main = scopes[0]
    none = Pairing(optimizer, main, [(slot, None) for slot in optimizer.slots])
    if optimizer.fault:
        return replace(none, reason=optimizer.fault)
    if not any(scope.named for scope in scopes):
        return replace(none, reason="there is no model beside it")
    if optimizer.slots and all(slot.name is not None for slot in optimizer.slots):
        return _by_names(optimizer, scopes, none)
    if optimizer.is_of_all:
        return replace(none, reason="its state is one of all parameters together (LBFGS)")
    if optimizer.is_flattened and not _fits_in(optimizer, scopes):
        return replace(none, reason="it has flat vectors in which parameters stand one after another")
    return _by_shapes(optimizer, scopes, none)


def _fits_in(optimizer: Optimizer, scopes: Sequence[Scope]) -> bool:
    """True if some tensor has the shape of each parameter."""
    shapes = {tensor.shape for scope in scopes for tensor in scope.candidates}
    return all(slot.shape in shapes for slot in optimizer.slots)


def _by_names(optimizer: Optimizer, scopes: Sequence[Scope], none: Pairing) -> Pairing:
    """Pair by the names that the optimizer has: in the place where most of them are."""
    best = none
    most = 0
    for scope in scopes[:_SCOPES]:
        if scope is not scopes[0] and not any(slot.name in scope.named for slot in optimizer.slots[:_SAMPLE]):
            continue
        for known in (scope.named, _unwrapped(scope.named)):
            pairs = [(slot, known.get(_bare(slot.name or "", known is scope.named))) for slot in optimizer.slots]
            count = sum(tensor is not None for _, tensor in pairs)
            if count > most:
                best, most = Pairing(optimizer, scope, pairs, "named"), count
            if most == len(pairs):
                return best
    return best if most else replace(none, reason="none of the names that it has is in the model")


def _unwrapped(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_bare(name, False): tensor for name, tensor in named.items()}


def _bare(name: str, is_exact: bool) -> str:
    """Return a name without the parts that wrappers add, unless it is to be exact."""
    if is_exact:
        return name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[:1] == [_OUTER] and len(parts) > 1 else parts)


def _by_shapes(optimizer: Optimizer, scopes: Sequence[Scope], none: Pairing) -> Pairing:
    """Pair by shapes: with the whole model, else with the one part of it that fits exactly."""
    main = scopes[0]
    first = _within(optimizer, main, none)
    if first.how is not None and (main.prefix or len(main.candidates) == len(optimizer.slots)):
        return first
    others = [_within(optimizer, scope, none) for scope in scopes[1:] if len(scope.candidates) == len(optimizer.slots)]
    fitting = [pairing for pairing in others if pairing.how is not None]
    if len(fitting) != 1:
        return first
    (part,) = fitting
    if first.how is not None and any(a is not b for (_, a), (_, b) in zip(first.pairs, part.pairs, strict=True)):
        return first
    if first.how == "unique":  # else it is not proved that the parameters are of this part
        return replace(first, scope=part.scope)
    hypothesis = f"{part.hypothesis or 'all parameters'} of {part.scope.prefix}"
    is_within = main.prefix != "" and part.scope.prefix.startswith(f"{main.prefix}.")
    return replace(part, how="order", hypothesis=hypothesis, scope=main if is_within else part.scope)


def _within(optimizer: Optimizer, scope: Scope, none: Pairing) -> Pairing:
    """Pair with the tensors of one place."""
    forced = _forced(optimizer.slots, scope.candidates)
    if forced is not None:
        return Pairing(optimizer, scope, list(zip(optimizer.slots, forced, strict=True)), "unique")
    if len(optimizer.slots) > len(scope.candidates):
        return replace(
            none,
            reason=f"it has {len(optimizer.slots):,} parameters, and the model at most {len(scope.candidates):,}",
        )
    if not scope.is_ordered:
        return replace(
            none, reason="the file does not keep the order of the module, and several parameters have the same shape"
        )
    return _by_order(optimizer, scope, none)


def _forced(slots: Sequence[Slot], candidates: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the one assignment that the shapes allow; None where there are several, or none."""
    shapes = [slot.shape for slot in slots]
    known = Counter(shapes)
    by_shape: dict[Shape | None, list[Tensor]] = {}
    for tensor in candidates:
        by_shape.setdefault(tensor.shape, []).append(tensor)
    if any(count > 1 for count in known.values()):
        return None
    if any(len(by_shape.get(shape, ())) != 1 for shape in shapes if shape is not None):
        return None
    rest = [tensor for tensor in candidates if tensor.shape not in known]
    if None in known and len(rest) != 1:
        return None
    return [rest[0] if shape is None else by_shape[shape][0] for shape in shapes]


# --- orders -----------------------------------------------------------------------------------------------------------


def _by_order(optimizer: Optimizer, scope: Scope, none: Pairing) -> Pairing:
    """Pair by the one order under which every shape fits."""
    showing = {id(slot.group) for slot in optimizer.slots if slot.shape is not None}
    listing = {id(slot.group) for slot in optimizer.slots}
    if len(listing) > 1 and listing != showing:
        return replace(none, reason="it has several groups, and nothing shows the shapes of all of them")
    found: dict[tuple[int, ...], Pairing] = {}
    for hypothesis, order in (("module order", _module_order), ("decay first", _decay_first)):
        fitting = order(optimizer, scope.candidates)
        if fitting is not None:
            left = len(fitting) < len(scope.candidates)
            pairs = list(zip(optimizer.slots, fitting, strict=True))
            pairing = Pairing(optimizer, scope, pairs, "order", hypothesis + (_TRAINABLE if left else ""))
            found.setdefault(tuple(map(id, fitting)), pairing)
    if len(found) == 1:
        return next(iter(found.values()))
    return replace(
        none,
        reason="several orders fit the shapes" if found else "no order of the parameters is known to fit the shapes",
    )


def _module_order(optimizer: Optimizer, candidates: Sequence[Tensor]) -> list[Tensor] | None:
    """The parameters as the model has them, through all groups."""
    return _embedded(optimizer.slots, candidates)


def _decay_first(optimizer: Optimizer, candidates: Sequence[Tensor]) -> list[Tensor] | None:
    """The matrices in groups with weight decay, and vectors, which are biases and norms, in the others."""
    by_group: dict[int, list[Slot]] = {}
    for slot in optimizer.slots:
        by_group.setdefault(id(slot.group), []).append(slot)
    if len(by_group) < 2:
        return None
    sides: dict[bool, list[Slot]] = {True: [], False: []}
    for slots in by_group.values():
        kinds = {len(shape) > 1 for shape in (slot.shape for slot in slots) if shape is not None}
        if len(kinds) != 1:
            return None
        sides[kinds.pop()] += slots
    found: dict[int, Tensor] = {}
    for is_matrix, slots in sides.items():
        fitting = _embedded(slots, [each for each in candidates if (len(each.shape or ()) > 1) is is_matrix])
        if fitting is None:
            return None
        found |= {id(slot): tensor for slot, tensor in zip(slots, fitting, strict=True)}
    return [found[id(slot)] for slot in optimizer.slots]


def _embedded(slots: Sequence[Slot], candidates: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the tensors that the parameters are, in the same order and some perhaps left out, if one choice fits."""
    shapes = [slot.shape for slot in slots]
    first = _earliest(shapes, candidates)
    last = _earliest(shapes[::-1], candidates[::-1])
    if first is None or last is None or any(a is not b for a, b in zip(first, reversed(last), strict=True)):
        return None
    return first


def _earliest(shapes: Sequence[Shape | None], candidates: Iterable[Tensor]) -> list[Tensor] | None:
    """Return the first tensors that fit, each after the one before; None where they do not all fit."""
    following = iter(candidates)
    found = [next((each for each in following if shape is None or each.shape == shape), None) for shape in shapes]
    return [each for each in found if each is not None] if None not in found else None
