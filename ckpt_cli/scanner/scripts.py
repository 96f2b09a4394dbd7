"""TorchScript code and its bytecode, read for operators that do more than compute.

The names of operators are those of torch's schemas: `torch.save` in the code is the operator `aten::save`, `ops.ns.f`
is `ns::f`, and `x.f(y)` is `aten::f` where `x` is a value (torch/csrc/jit/serialization/import_source.cpp and
python_print.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.scanner.judge import judge
from ckpt_cli.scanner.streams import Oddity

_BYTE_COSTS = 2
"""Opcodes of a pickle in whose time a byte of code is read."""

_SHOWN = 100
"""Findings of one record."""

_EFFECTS: dict[str, str] = {
    name: why
    for why, names in {
        "writes a file": "aten::save image::write_file torchaudio::sox_io_save_audio_file",
        "reads a file": (
            "aten::from_file debugprims::load_tensor image::read_file torchaudio::sox_io_load_audio_file "
            "torchaudio::sox_io_get_info torchaudio::sox_effects_apply_effects_file "
            "video_reader::read_video_from_file video_reader::probe_video_from_file"
        ),
        "runs code of another process": "prim::rpc_async prim::rpc_sync prim::rpc_remote",
    }.items()
    for name in names.split()
}
"""Operators with an effect beyond their results, by the names of their schemas."""

_NAMESPACES = {
    "c10d": "talks to other processes",
    "_c10d_functional": "talks to other processes",
    "_c10d_functional_autograd": "talks to other processes",
    "symm_mem": "talks to other processes",
    "rpc": "runs code of another process",
    "dist_rpc": "runs code of another process",
    "debugprims": "reads files",
}
"""Namespaces of operators all of which have such an effect."""

_PURE = frozenset((
    "aten", "prim", "prims", "onnx", "static_runtime", "inductor", "inductor_prims", "quantization", "quantized",
    "_quantized", "sparse", "mkldnn", "onednn", "mkldnn_prepacked", "mkl", "rngprims", "export", "profiler",
    "prepacked", "nnapi", "vulkan_prepack", "metal_prepack", "torchvision", "fbgemm", "torchaudio", "torchtext",
    "image",
))  # fmt: skip
"""Namespaces of operators that compute, but for those above."""

_METHODS = {name.partition("::")[2]: why for name, why in _EFFECTS.items() if name in ("aten::save", "aten::from_file")}
"""Operators that any value has as a method."""


def effect_of(namespace: str, name: str) -> str | None:
    """Return what an operator does besides computing; None where that is not known to be anything."""
    return _EFFECTS.get(f"{namespace}::{name}") or _NAMESPACES.get(namespace)


_LITERALS = re.compile(
    rb"""\"\"\"(?s:.*?)(?:\"\"\"|\Z)
    | '''(?s:.*?)(?:'''|\Z) | "(?:[^"\\\n]|\\.)*"? | '(?:[^'\\\n]|\\.)*'? | \#[^\n]*""",
    re.VERBOSE,
)
"""Strings and comments: each alternative matches wherever it begins, so that none is tried twice."""

_GAP = rb"[ \t\r\n\f\\]{0,4096}"
_CHAIN = re.compile(rb"(\.GAP)?[A-Za-z_]\w*(?:GAP\.GAP[A-Za-z_]\w*){0,64}".replace(b"GAP", _GAP))
"""A dotted name, or attributes of a value that is not a name."""

_FAR = 4096
"""Bytes in which something follows a name, else it is reported: its attribute may stand beyond."""

_IMPORTS = re.compile(rb"^[ \t]*(?:import|from)[ \t]+([\w.]+)", re.MULTILINE)


def script_findings(code: memoryview, where: str, budget: ScanBudget) -> Iterator[Oddity]:
    """The operators with effects that a record of code uses, and the modules that it imports."""
    room = max(min(limits.SCAN_BYTES - budget.searched, budget.opcodes // _BYTE_COSTS), 0)
    if len(code) > room:
        yield Oddity("warning", "not-searched", where, f"{len(code) - room} bytes of code that were not searched")
    text = bytes(code[:room])
    budget.searched += len(text)
    budget.opcodes -= _BYTE_COSTS * len(text)
    seen: set[str] = set()
    text = _LITERALS.sub(lambda match: b" " if match[0][:1] == b"#" else b" 0 ", text)
    for severity, message in chain(_imported(text), _used(text)):
        if message not in seen and len(seen) < _SHOWN:
            seen.add(message)
            yield Oddity(severity, "script-effect", where, message)


def _imported(text: bytes) -> Iterator[tuple[str, str]]:
    """The modules that a code imports; TorchScript's own imports only what begins with `__torch__`."""
    for match in _IMPORTS.finditer(text):
        module = match[1].decode("utf-8", "replace")[:200]
        if module.split(".")[0] != "__torch__" and judge(module, "_").verdict == "dangerous":
            yield "warning", f"the code imports {module}: {judge(module, '_').reason}"


def _used(text: bytes) -> Iterator[tuple[str, str]]:
    """The operators that a code uses, called or not."""
    own = re.compile(rb"def[ \t]+(?:" + b"|".join(name.encode() for name in _METHODS) + rb")[ \t]*\(").search(text)
    for match in _CHAIN.finditer(text):
        parts = _parts(match[0])
        if match[1] is None and parts[0] in ("torch", "ops"):
            yield from _operator(parts, text, match.end())
        elif parts[-1] in _METHODS and (match[1] is not None or len(parts) > 1) and parts[0] != "__torch__":
            said = f"the code calls a method {parts[-1]}; that of a value {_METHODS[parts[-1]]}"
            if not own:
                yield "error", said
            elif text[max(match.start() - 6, 0) : match.start()] != b"(self)":
                yield "warning", said


def _parts(dotted: bytes) -> list[str]:
    plain = dotted.translate(None, b" \t\r\n\f\\")
    return [part.decode("utf-8", "replace") for part in plain.strip(b".").split(b".")]


def _operator(parts: list[str], text: bytes, end: int) -> Iterator[tuple[str, str]]:
    """The operator that a chain of names begins with."""
    if len(parts) == 1:
        following = text[end : end + _FAR].strip(b" \t\r\n\f\\")
        if not following or (parts[0] == "torch" and following[:1] not in (b":", b"=")):
            yield "warning", "the code hands on torch itself, by which it can reach any operator"
        return
    first = ["aten", *parts[1:]] if parts[0] == "torch" else parts[1:]
    namespace, name = first[0], first[1] if len(first) > 1 else ""
    why = effect_of(namespace, name)
    said = ".".join(parts[: 2 if parts[0] == "torch" else 3])[:200]
    if why:
        yield "error" if f"{namespace}::{name}" in _EFFECTS else "warning", f"the code calls {said}, which {why}"
    elif namespace not in _PURE:
        yield "note", f"the code calls {said}: the library that has this operator decides what it does"


_QUALIFIED = re.compile(rb"[A-Za-z_]\w{0,99}::[A-Za-z_]\w{0,99}")
_OPCODES = {b"X": 4, b"\x8c": 1, b"U": 1, b"T": 4}
"""Opcodes of strings, each with the bytes of the length before the text."""


def bytecode_findings(data: memoryview, where: str) -> Iterator[Oddity]:
    """The operators with effects in the bytecode of mobile interpreters, where they stand as `aten::save`."""
    names = dict.fromkeys(_whole_name(data, match.start(), match.end()) for match in _QUALIFIED.finditer(data))
    for qualified in names:
        namespace, _, name = qualified.partition("::")
        why = effect_of(namespace, name)
        if why:
            severity = "error" if qualified in _EFFECTS else "warning"
            yield Oddity(severity, "script-effect", where, f"the bytecode calls {qualified}, which {why}")


def _whole_name(data: memoryview, begin: int, end: int) -> str:
    """The name between two bytes of a pickle: the opcode after a string may look like a letter of it."""
    for opcode, width in _OPCODES.items():
        at = begin - width - 1
        if at >= 0 and bytes(data[at : at + 1]) == opcode:
            end = min(end, begin + int.from_bytes(data[at + 1 : begin], "little"))
    return bytes(data[begin:end]).decode()
