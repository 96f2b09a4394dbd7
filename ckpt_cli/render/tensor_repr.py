"""The text of one tensor of any layout, as torch prints it where torch can.

The rules are those of torch/_tensor_str.py (`_str_intern`) and of the reprs of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.ops.show import (
    EDGE_ITEMS,
    FULL_OVER,
    SUMMARY_OVER,
    Composed,
    Shown,
    Unshown,
    printed_numel,
    require_bounded,
)
from ckpt_cli.render.array_repr import append_suffixes, contents_text, tensor_text
from ckpt_cli.render.text import escaped, name_text, tensor_note


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of printed values."""

    precision: int
    """Digits after the point."""
    full: bool
    """True if large tensors are not summarized."""


def item_text(item: Shown | Composed | Unshown, layout: Layout) -> str:
    """Return a tensor as torch prints it; raises UnsupportedError for more elements than text can hold."""
    if isinstance(item, Unshown):
        return tensor_note(item.tensor)
    if isinstance(item, Shown):
        return _shown_text(item, layout)
    require_bounded([item])
    kind = item.tensor.layout
    compose = _COMPOSED.get("sparse" if kind.startswith("sparse") else kind, _wrapper_text)
    text = compose(item, layout)
    is_plain = item.tensor.kind == "parameter" and kind not in ("wrapper", "uninitialized")
    return f"Parameter containing:\n{text}" if is_plain else text


# --- values of one storage --------------------------------------------------------------------------------------------


def _values(shown: Shown, layout: Layout) -> tuple[Any, bool]:
    """Return the values to print as nested lists, and whether they are a summary."""
    numel, summarized = printed_numel(shown, full=layout.full)
    if numel > FULL_OVER:
        raise UnsupportedError(
            f"{name_text(shown.label)} has {numel:,} elements, too many to lay out as text",
            hint="--json and -o FILE.npy write any number of elements, and [...] picks some",
        )
    if 0 in shown.shape:
        return [], summarized
    return (shown.edges() if summarized else shown.array()).tolist(), summarized


def _shown_text(shown: Shown, layout: Layout) -> str:
    values, summarized = _values(shown, layout)
    tensor = shown.tensor
    quantized = tensor.quantizer is not None
    return tensor_text(
        values,
        shape=shown.shape,
        dtype="float32" if quantized else tensor.dtype.name,
        summarized=summarized,
        precision=layout.precision,
        requires_grad=tensor.requires_grad,
        is_parameter=shown.whole and tensor.kind == "parameter",
        prefix=_prefix(tensor),
        suffixes=_quantized_suffixes(shown, layout) if quantized else None,
    )


def _prefix(tensor: Tensor) -> str:
    """`tensor(`, or the name of a subclass."""
    return "tensor(" if tensor.python_type in (None, "numpy.ndarray") else f"{_class_name(tensor)}("


def _class_name(tensor: Tensor) -> str:
    return escaped((tensor.python_type or tensor.layout).rpartition(".")[2])


def _quantized_suffixes(shown: Shown, layout: Layout) -> list[str] | None:
    """Return the quantization; None for a part of a tensor of several channels, which is printed as it is."""
    from ckpt_cli.arrays.quantized import parameters

    quantizer = shown.tensor.quantizer
    if quantizer is None or (quantizer.axis is not None and not shown.whole):
        return None
    suffixes = [
        f"size={shown.shape}",
        f"dtype=torch.{shown.tensor.dtype}",
        f"quantization_scheme=torch.{quantizer.scheme}",
    ]
    if quantizer.axis is None:
        return [*suffixes, f"scale={quantizer.scale}", f"zero_point={quantizer.zero_point}"]
    is_float = quantizer.scheme.endswith("float_qparams")
    scales, zeros = parameters(shown.checkpoint, shown.tensor)
    scale = _array_text(scales, "float32" if is_float else "float64", layout)
    zero = _array_text(zeros, "float32" if is_float else "int64", layout)
    return [*suffixes, f"scale={scale}", f"zero_point={zero}", f"axis={quantizer.axis}"]


def _array_text(values: Any, dtype: str, layout: Layout) -> str:
    """Return a row of numbers as torch prints a tensor."""
    summarized = not layout.full and values.size > SUMMARY_OVER
    shape = tuple(values.shape)
    if not summarized and values.size > FULL_OVER:
        raise UnsupportedError(
            f"{values.size:,} scales are too many to lay out as text", hint="--json writes any number"
        )
    kept = [*values[:EDGE_ITEMS].tolist(), *values[-EDGE_ITEMS:].tolist()] if summarized else values.tolist()
    return tensor_text(kept, shape=shape, dtype=dtype, summarized=summarized, precision=layout.precision)


# --- what is made of others -------------------------------------------------------------------------------------------


def _sparse_text(item: Composed, layout: Layout) -> str:
    """Return `tensor(indices=tensor(…), values=tensor(…), size=…, nnz=…)`."""
    tensor = item.tensor
    prefix = _prefix(tensor)
    indent = " " * len(prefix)
    pieces = []
    for part in item.parts[: 2 if tensor.layout == "sparse_coo" else 3]:
        heading = f"{part.tensor.name}=tensor("
        if isinstance(part, Shown):
            values, summarized = _values(part, layout)
            text = contents_text(
                values,
                shape=part.shape,
                dtype=part.tensor.dtype.name,
                summarized=summarized,
                precision=layout.precision,
                indent=len(prefix) + len(heading),
            )
            size = f", size={part.shape}" if 0 in part.shape else ""
            pieces.append(f"{heading}{text}{size})")
        else:
            pieces.append(f"{part.tensor.name}={item_text(part, layout)}")
    suffixes = [f"size={tensor.shape}", f"nnz={tensor.nnz}"]
    if tensor.dtype.name not in _DEFAULT:
        suffixes.append(f"dtype=torch.{tensor.dtype}")
    suffixes.append(f"layout=torch.{tensor.layout}")
    if tensor.requires_grad:
        suffixes.append("requires_grad=True")
    text = prefix + f",\n{indent}".join(pieces)
    return append_suffixes(text, suffixes, len(prefix), newline=tensor.layout == "sparse_coo") + ")"


_DEFAULT = frozenset({"float32", "complex64", "int64", "bool"})
"""Dtypes that torch does not name."""


def _nested_text(item: Composed, layout: Layout) -> str:
    """Return `nested_tensor([…])` of its constituents; of a jagged tensor torch itself shows only the offsets."""
    texts = ["  " + item_text(part, layout).replace("\n", "\n  ") for part in item.parts]
    suffixes = ["layout=torch.jagged"] if item.tensor.layout == "jagged" else []
    if item.tensor.requires_grad:
        suffixes.append("requires_grad=True")
    text = "nested_tensor([\n" + ",\n".join(texts) + "\n]"
    return append_suffixes(text, suffixes, len("nested_tensor(")) + ")"


def _meta_text(item: Composed, _layout: Layout) -> str:
    tensor = item.tensor
    suffixes = ["device='meta'", f"size={tensor.shape}"]
    if tensor.dtype.name != "float32":
        suffixes.append(f"dtype=torch.{tensor.dtype}")
    if tensor.requires_grad:
        suffixes.append("requires_grad=True")
    prefix = _prefix(tensor)
    return append_suffixes(f"{prefix}...", suffixes, len(prefix)) + ")"


def _uninitialized_text(item: Composed, _layout: Layout) -> str:
    return f"<Uninitialized{'Buffer' if item.tensor.kind == 'buffer' else 'Parameter'}>"


def _wrapper_text(item: Composed, layout: Layout) -> str:
    """Return a DTensor as torch prints it; any other class with its parts, a line each."""
    tensor, sharding = item.tensor, item.tensor.sharding
    if sharding is not None and sharding.placements:
        local = item_text(item.parts[0], layout)
        facts = f"device_mesh={escaped(sharding.mesh)}, placements={escaped(sharding.placements)}"
        return f"{_class_name(tensor)}(local_tensor={local}, {facts})"
    lines = [f"{_class_name(tensor)}(size={tensor.shape}, dtype=torch.{tensor.dtype}"]
    for number, part in enumerate(item.parts):
        at = f" at {sharding.offsets[number]}" if sharding is not None and sharding.offsets else ""
        heading = f"  {escaped(part.tensor.name)}{at}="
        lines.append(heading + item_text(part, layout).replace("\n", "\n" + " " * len(heading)))
    return ",\n".join(lines) + ")"


_COMPOSED: dict[str, Callable[[Composed, Layout], str]] = {
    "sparse": _sparse_text,
    "nested": _nested_text,
    "jagged": _nested_text,
    "meta": _meta_text,
    "uninitialized": _uninitialized_text,
    "wrapper": _wrapper_text,
}
