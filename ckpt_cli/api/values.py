"""Values of Python as the right sides of assignments, for `ckpt_cli.set`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ckpt_cli.edits.assignment import Assignment
from ckpt_cli.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Assignments = Mapping[str, Any] | Sequence[str]
"""New values by their targets, or assignments as on the command line."""

_OPERATORS = ("+=", "-=", "*=", "/=")


@contextmanager
def assignments_of(given: Assignments) -> Iterator[list[str | Assignment]]:
    """Context manager: the assignments; arrays lie in temporary files until it ends.

    Raises UsageError for a value that cannot be written, or a text in place of several.
    """
    if isinstance(given, str):
        raise UsageError("assignments are a dict, or a list of texts: ['NAME=VALUE']")
    if not isinstance(given, Mapping):
        yield list(given)
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-set-") as folder:
        made: list[str | Assignment] = []
        for number, (key, value) in enumerate(given.items()):
            target, operator = (key[:-2].strip(), key[-2]) if key.endswith(_OPERATORS) else (key, "")
            made.append(Assignment(target, operator, _text(key, value, os.path.join(folder, f"{number}.npy"))))
        yield made


def _text(key: str, value: Any, path: str) -> str:
    """Return a value as it stands behind the `=`; an array is written to `path`."""
    array = _array(value)
    if array is not None and array.ndim:
        import numpy as np

        np.save(path, array, allow_pickle=False)
        return f"@{path}"
    if array is not None:
        value = array.item()
    if isinstance(value, complex):
        return repr(value).strip("()")
    try:
        return (
            "None" if value is None else repr(value) if isinstance(value, float) else json.dumps(value, default=_item)
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{key!r}: a {type(value).__name__} cannot be written: {error}",
            hint="values are numbers, arrays, tensors, texts, None, and lists and dicts of these",
        ) from None


def _item(value: Any) -> object:
    """Return an item of a list that JSON does not know: a number of numpy or torch, or a complex one as text."""
    array = _array(value)
    if array is not None:
        value = array.tolist()
    if isinstance(value, complex):
        return repr(value).strip("()")
    if array is None:
        raise TypeError(f"{type(value).__name__} is not plain")
    return value


def _array(value: Any) -> NDArray[Any] | None:
    """Return an array, a tensor or a number of numpy as an array that .npy files can hold; None for other values."""
    if not hasattr(value, "__array__"):
        return None
    import numpy as np

    if hasattr(value, "detach"):
        value = _plain_tensor(value)
    array = np.asarray(value)
    if array.dtype.kind == "V" and array.dtype.names is None:  # bfloat16 and the like of ml_dtypes
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise UsageError(f"an array of {array.dtype} cannot be written", hint="arrays have numbers or truth values")
    return array


def _plain_tensor(tensor: Any) -> Any:
    """Return a tensor of torch as numpy can take it: its values, small floats as float32."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()
