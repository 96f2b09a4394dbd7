"""Whether the reference library and `ckpt` take a safetensors file, and that both read the same from it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from builders import st as files
from builders.st import floats, info
from safetensors import SafetensorError, deserialize

from ckpt_cli.dtypes import BY_SAFETENSORS
from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.safetensors import header
from ckpt_cli.model.checkpoint import Checkpoint

DATA = bytes(range(16))
SOUND = {"a": info("F32", [4], 0, 16)}


def theirs(content: bytes) -> dict[str, dict[str, Any]] | None:
    """What the reference reads: dtype, shape and bytes of each name; None where it refuses the file."""
    try:
        return dict(deserialize(content))
    except SafetensorError:
        return None


def opened(folder: Path, content: bytes) -> Checkpoint:
    """A file of that content, opened."""
    path = folder / "some.safetensors"
    path.write_bytes(content)
    return open_checkpoint(str(path))


def ours(folder: Path, content: bytes) -> dict[str, dict[str, Any]] | None:
    """What we read, told as the reference tells it; None where we refuse the file."""
    by_parser, by_expression = (_outcome(folder, content, longest) for longest in (len(content), 0))
    assert (by_parser.facts, str(by_parser.refused)) == (by_expression.facts, str(by_expression.refused))
    refused = by_parser.refused
    if refused is None:
        return by_parser.tensors
    assert refused.path == str(folder / "some.safetensors")
    assert "\n" not in str(refused)
    return None


@dataclass
class _Outcome:
    """What opening a file comes to."""

    tensors: dict[str, dict[str, Any]]
    facts: object = None
    """All that is known of its tensors, and the metadata."""
    refused: CkptError | None = None


def _outcome(folder: Path, content: bytes, shortest: int) -> _Outcome:
    """Open a file; a header longer than `shortest` characters is read by the expression where that takes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(header, "_LONG", shortest)
        try:
            checkpoint = opened(folder, content)
        except CkptError as error:
            return _Outcome({}, refused=error)
    facts = [(*astuple(replace(t, storage=None)), t.storage and t.storage.extents(0, 1)) for t in checkpoint.tensors]
    return _Outcome(read(checkpoint), (facts, dict(checkpoint.metadata), checkpoint.container.has_more))


def read(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Every tensor, told as the reference tells it."""
    found = {}
    for tensor in checkpoint.tensors:
        if tensor.alias_of is None:
            assert tensor.storage is not None
            data = bytearray(tensor.storage.view(0, tensor.storage.nbytes))
            found[tensor.name] = {"shape": list(tensor.shape or ()), "dtype": tensor.dtype.name, "data": data}
    checkpoint.close()
    return found


def agree(folder: Path, content: bytes) -> bool:
    """Compare the verdicts and what is read; whether the file is accepted."""
    expected, found = theirs(content), ours(folder, content)
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return False
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        spelled = BY_SAFETENSORS[tensor["dtype"]].name
        if found[name]["dtype"] == "float4_e2m1fn_x2":
            spelled, tensor["shape"][-1] = "float4_e2m1fn_x2", tensor["shape"][-1] // 2
        assert found[name] == {"shape": tensor["shape"], "dtype": spelled, "data": tensor["data"]}
    return True


def one(header: str = "", data: bytes = DATA, **fields: Any) -> bytes:
    """A file of one tensor of 16 bytes: its fields changed, or its header given."""
    return files.file(header or {"a": {**SOUND["a"], **fields}}, data)


def text(inside: str) -> str:
    """A header with something more among the fields of its tensor."""
    return '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]' + inside + "}}"


def several(*counts: int, order: str = "", cut: int = 0, **changed: tuple[int, int]) -> bytes:
    """Tensors t0, t1… of so many floats each, their offsets changed by name, the names in some order."""
    header, data = floats(*counts)
    for name, offsets in changed.items():
        header[name]["data_offsets"] = list(offsets)
    header = {name: header[name] for name in order.split()} if order else header
    return files.file(header, data[: len(data) - cut])
