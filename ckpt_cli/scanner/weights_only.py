"""The rules of `torch.load(weights_only=True)`: does it take a file, and which names would it have to be allowed?

The opcodes of each pickle are followed as torch's restricted unpickler follows them (torch 2.13,
torch/_weights_only_unpickler.py), on inert nodes. Where torch would stop at a name that it does not know, this goes on
as if `torch.serialization.add_safe_globals` had been given it, so that all the names are found at once.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError, UnsupportedError
from ckpt_cli.files.source import ByteSource
from ckpt_cli.formats.signatures import HEAD, ZIP_RECORD, is_legacy, is_pickle, is_tar
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, PersistentId, RawString
from ckpt_cli.pickles.legacy_save import MAGIC
from ckpt_cli.pickles.machine import Handler, Machine, Table, entering
from ckpt_cli.pickles.opcodes.push import Stopped
from ckpt_cli.pickles.read import OPCODES
from ckpt_cli.scanner.allowlist import ALLOWED
from ckpt_cli.scanner.calls import resolve
from ckpt_cli.scanner.judge import judge

_CHECK_EVERY = 1 << 14
"""Opcodes between two looks at the memory."""

_BLOCKED = ("sys", "os", "posix", "nt")
"""Modules whose names torch refuses even if they are allowed (`_blocklisted_modules`)."""

_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "Queue": "queue", "repr": "reprlib",
            "_abcoll": "collections.abc", "UserDict": "collections", "UserList": "collections",
            "UserString": "collections", "whichdb": "dbm", "StringIO": "io", "cStringIO": "io"}  # fmt: skip
"""Modules of Python 2 by their names in Python 3, as torch has them (torch/_utils.py `IMPORT_MAPPING`)."""

_NAMES = {
    ("__builtin__", "xrange"): ("builtins", "range"),
    ("__builtin__", "reduce"): ("functools", "reduce"),
    ("__builtin__", "intern"): ("sys", "intern"),
    ("__builtin__", "unichr"): ("builtins", "chr"),
    ("__builtin__", "unicode"): ("builtins", "str"),
    ("__builtin__", "long"): ("builtins", "int"),
    ("itertools", "izip"): ("builtins", "zip"),
    ("itertools", "imap"): ("builtins", "map"),
    ("itertools", "ifilter"): ("builtins", "filter"),
    ("itertools", "ifilterfalse"): ("itertools", "filterfalse"),
    ("itertools", "izip_longest"): ("itertools", "zip_longest"),
    ("UserDict", "IterableUserDict"): ("collections", "UserDict"),
    ("__builtin__", "basestring"): ("builtins", "str"),
    ("exceptions", "StandardError"): ("builtins", "Exception"),
}
"""Names of Python 2, likewise (`NAME_MAPPING` there)."""

_MAPPINGS = ("collections.OrderedDict", "collections.Counter")
"""The classes besides dict whose items may be set."""

_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter")

_MADE_OF_ARGUMENT = ("copyreg._reconstructor", "numpy.core.multiarray._reconstruct",
                     "numpy._core.multiarray._reconstruct", "numpy.random._pickle.__bit_generator_ctor")  # fmt: skip
"""Functions that make an object of the class that is their first argument."""

_MADE = {
    "numpy.random._pickle.__randomstate_ctor": "numpy.random.mtrand.RandomState",
    "numpy.random._pickle.__generator_ctor": "numpy.random._generator.Generator",
}
"""The class of what other functions make."""

_DTYPES = {
    "b1": "Bool", "i1": "Int8", "i2": "Int16", "i4": "Int32", "i8": "Int64", "u1": "UInt8", "u2": "UInt16",
    "u4": "UInt32", "u8": "UInt64", "f2": "Float16", "f4": "Float32", "f8": "Float64", "f16": "LongDouble",
    "c8": "Complex64", "c16": "Complex128", "c32": "CLongDouble", "U": "Str", "S": "Bytes", "V": "Void",
    "O": "Object", "M": "DateTime64", "m": "TimeDelta64",
}  # fmt: skip
"""The class of each dtype of numpy in `numpy.dtypes`, by its code or the first character of that."""


_PARTS = (".distcp", ".metadata")
"""The files of a distributed checkpoint, which torch.load is not given."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer about one file."""

    where: str
    safe_globals: tuple[str, ...] = ()
    """The names that have to be allowed, as the file spells them, in order of first use."""
    problem: str = ""
    """The reason that no allowed name makes it load; empty where there is none."""

    @property
    def loads(self) -> bool:
        """True if `torch.load(weights_only=True)` takes the file as it is."""
        return not self.safe_globals and not self.problem


@dataclass(slots=True)
class WeightsOnly:
    """The answers about the files of a checkpoint or a folder that torch.load has to do with."""

    files: list[Verdict] = field(default_factory=list)

    def look(self, source: ByteSource, where: str) -> None:
        """Add the answer about one file."""
        verdict = verdict_of(source, where)
        if verdict is not None and len(self.files) < limits.SCAN_FILES:
            self.files.append(verdict)

    @property
    def loads(self) -> bool:
        """True if torch takes all of them as they are."""
        return all(verdict.loads for verdict in self.files)

    @property
    def safe_globals(self) -> list[str]:
        """The names that have to be allowed for any of them."""
        return list(dict.fromkeys(name for verdict in self.files for name in verdict.safe_globals))

    @property
    def problems(self) -> list[Verdict]:
        """The files that no allowed name makes load."""
        return [verdict for verdict in self.files if verdict.problem]

    @property
    def dangerous(self) -> list[str]:
        """Those of the names that run code, and that nobody should allow."""
        return [name for name in self.safe_globals if judge(*name.rpartition(".")[::2]).verdict == "dangerous"]


def verdict_of(source: ByteSource, where: str) -> Verdict | None:
    """Return the answer about a file; None for one that torch.load has nothing to do with, or that cannot be read."""
    if where.endswith(_PARTS):
        return None
    head = source.read(0, min(HEAD, source.size))
    try:
        if head.startswith(ZIP_RECORD):
            return _of_zip(source, where)
        if is_tar(head):
            return _of_tar(source, where)
        if is_legacy(head):
            return _of_legacy(source, where)
    except (FormatError, UnsupportedError):
        return None
    if is_pickle(head):
        return Verdict(where, problem="it is a plain pickle, not a file of torch.save")
    return None


def _of_zip(source: ByteSource, where: str) -> Verdict | None:
    """The answer about a zip file, whose folder is that of its first record."""
    from ckpt_cli.formats.zip.container import prefix_of
    from ckpt_cli.formats.zip.read import ZipRecords

    records = ZipRecords(source)
    prefix = prefix_of(records)
    if f"{prefix}constants.pkl" in records.by_name:
        return Verdict(where, problem="it is a TorchScript archive")
    if f"{prefix}data.pkl" not in records.by_name:
        return None
    data = records.read(f"{prefix}data.pkl", limits.PICKLE_INFLATED)
    found = _Loader(data)
    return Verdict(where, problem=found.load(0), safe_globals=tuple(found.needed))


def _of_tar(source: ByteSource, where: str) -> Verdict | None:
    """The answer about a tar file: torch refuses any, but only those of its own are worth a word."""
    head = source.read(0, min(100, source.size)).partition(b"\0")[0].removeprefix(b"./")
    ours = head in (b"", b"sys_info", b"pickle", b"tensors", b"storages")
    return Verdict(where, problem="it is in the .tar format of torch 0.1") if ours else None


def _of_legacy(source: ByteSource, where: str) -> Verdict:
    """The answer about a stream: magic, version, facts of the system, the object, the keys of its storages."""
    data = source.view(0, source.size)
    needed: dict[str, None] = {}
    position = 0
    for number in range(5):
        found = _Loader(data, legacy=True)
        problem = found.load(position)
        needed |= found.needed
        if not problem and number == 0 and found.root != MAGIC:
            problem = "it is a plain pickle, not a file of torch.save"
        if problem:
            return Verdict(where, tuple(needed), problem)
        position = found.end
    return Verdict(where, tuple(needed))


class _RefusedError(FormatError):
    """Torch's loader would stop here, whatever names it were allowed."""


class _Loader(Machine):
    """The machine of one pickle, which remembers the names that torch would ask for."""

    __slots__ = ("end", "legacy", "needed", "root")

    def __init__(self, data: bytes | memoryview, *, legacy: bool = False) -> None:
        super().__init__(data)
        self.legacy = legacy
        """True for a pickle of the format of before torch 1.6."""
        self.needed: dict[str, None] = {}
        self.root: object = None
        self.end = 0
        """The byte after STOP."""

    def load(self, pos: int) -> str:
        """Follow the pickle that begins at a byte; returns the reason that torch refuses it, empty where it does not.

        Raises LimitError where the pickle is beyond the limits.
        """
        data, blocks = self.data, sys.getallocatedblocks() + limits.PICKLE_BLOCKS
        try:
            for _ in range(0, limits.PICKLE_OPCODES, _CHECK_EVERY):
                for _ in range(_CHECK_EVERY):
                    pos = _LOADING[data[pos]](self, pos + 1)
                if sys.getallocatedblocks() > blocks:
                    raise LimitError("builds far more objects than a checkpoint needs")
            raise LimitError(f"has more than {limits.PICKLE_OPCODES} opcodes")
        except Stopped:
            self.end = pos + 1
        except _RefusedError as error:
            return error.problem
        except LimitError:
            raise
        except (FormatError, ValueError, OverflowError, IndexError, struct.error):
            return f"its pickle is broken (byte {pos})"
        if not self.stack:
            return f"its pickle is broken (byte {pos})"
        self.root = self.stack.pop()
        return ""

    def need(self, name: str) -> None:
        """Note a name that torch does not know by default."""
        if name not in ALLOWED:
            self.needed.setdefault(name)


# --- the opcodes that torch has rules for -----------------------------------------------------------------------------

_OVER: Table = {}

_enter = entering(_OVER)


def _loader(m: Machine) -> _Loader:
    assert isinstance(m, _Loader)
    return m


@_enter(b"c")
def _global(m: Machine, pos: int) -> int:
    pos = OPCODES[ord("c")](m, pos)
    read = m.stack[-1]
    assert isinstance(read, Global)
    module, name = _NAMES.get((read.module, read.name)) or (_MODULES.get(read.module, read.module), read.name)
    if module in _BLOCKED:
        raise _RefusedError(f"it names {module}.{name}, and torch refuses every name of {module}")
    node = m.stack[-1] = read if module == read.module and name == read.name else m.name(module, name)
    assert isinstance(node, Global)
    _loader(m).need(node.qualified)
    return pos


def _named(m: Machine, func: object, doing: str) -> None:
    """Note the name of a callee, which may be an attribute of a class; refuse what has none."""
    found = resolve(func)
    if found is None:
        raise _RefusedError(f"it {doing} {describe(func)}, which has no name that could be allowed")
    _loader(m).need(".".join(found))


@_enter(b"R")
def _reduce(m: Machine, pos: int) -> int:
    stack = m.stack
    if type(stack[-2]) is not Global:  # a name was noted when it was pushed
        _named(m, stack[-2], "calls")
    args = stack.pop()
    stack[-1] = Call("reduce", stack[-1], args)
    return pos


@_enter(b"\x81")
def _newobj(m: Machine, pos: int) -> int:
    if type(m.stack[-2]) is not Global:
        _named(m, m.stack[-2], "makes an object of")
    return OPCODES[0x81](m, pos)


@_enter(b"b")
def _build(m: Machine, pos: int) -> int:
    kind = _class_of(m.stack[-2])
    if kind is None:
        raise _RefusedError(f"it gives a state to {describe(m.stack[-2])}, which has no class that could be allowed")
    if kind not in _TENSORS:
        _loader(m).need(kind)
    return OPCODES[ord("b")](m, pos)


def _filling(code: bytes, allowed: Callable[[object], bool], doing: str, text: str, *, many: bool) -> None:
    """Enter an opcode that fills containers of a few exact classes only."""
    handler = OPCODES[code[0]]
    depth = 2 if code == b"a" else 3

    @_enter(code)
    def run(m: Machine, pos: int) -> int:
        if many and not m.below:
            raise IndexError
        target = m.below[-1][-1] if many else m.stack[-depth]
        if not allowed(target):
            raise _RefusedError(
                f"it {doing} a {_class_of(target) or describe(target)}, where torch takes a {text} only"
            )
        return handler(m, pos)


def _is_list(node: object) -> bool:
    return type(node) is list


def _is_mapping(node: object) -> bool:
    return type(node) is Dict or (type(node) is Call and _class_of(node) in _MAPPINGS)


for _code, _many in ((b"a", False), (b"e", True)):
    _filling(_code, _is_list, "appends to", "list", many=_many)
for _code, _many in ((b"s", False), (b"u", True)):
    _filling(_code, _is_mapping, "sets items of", "dict, OrderedDict or Counter", many=_many)


@_enter(b"U")
def _short_binstring(m: Machine, pos: int) -> int:
    pos = OPCODES[ord("U")](m, pos)
    node = m.stack[-1]
    if isinstance(node, RawString):
        try:
            node.raw.decode()
        except UnicodeDecodeError:
            raise _RefusedError("it has a byte string of Python 2 that is not UTF-8") from None
    return pos


@_enter(b"Q")
def _binpersid(m: Machine, pos: int) -> int:
    pid = m.stack[-1]
    parts = pid if type(pid) is tuple and len(pid) > 1 else (None, None)
    kind = parts[0].text if isinstance(parts[0], RawString) else parts[0]
    if kind != "storage":
        what = f"a {kind}" if isinstance(kind, str) else describe(pid)
        raise _RefusedError(f"it refers to {what} outside the pickle, where torch takes storages only")
    if type(parts[1]) is Global and parts[1].name == "UntypedStorage" and _loader(m).legacy:
        raise _RefusedError("it refers to a storage without a dtype, which torch cannot load from a file of this age")
    m.stack[-1] = PersistentId(pid)
    return pos


def _class_of(node: object) -> str | None:
    """Return the class of an object that the pickle makes, by its dotted name; None where it has none to allow."""
    if type(node) is not Call:
        return None
    func = node.func
    args = node.args if type(node.args) is tuple else ()
    if type(func) is not Global:
        found = resolve(func)
        return ".".join(found) if found is not None else None
    name = func.qualified
    if node.opcode == "reduce":
        if name == "numpy.dtype":
            return _dtype_class(args)
        if name in _MADE_OF_ARGUMENT and args and type(args[0]) is Global:
            return args[0].qualified
        if name.startswith("torch._utils._rebuild_parameter"):
            return "torch.nn.parameter.Parameter"
        if name.startswith("torch._utils._rebuild_"):
            return "torch.Tensor"
    return _MADE.get(name, name)


def _dtype_class(args: tuple[object, ...]) -> str:
    code = args[0] if args else None
    if isinstance(code, RawString):
        code = code.text
    if type(code) is Global:
        return f"numpy.dtype[{code.name}]"
    text = code if isinstance(code, str) else ""
    kind = _DTYPES.get(text) or _DTYPES.get(text[:1])
    return f"numpy.dtypes.{kind}DType" if kind else "numpy.dtype"


def _unsupported(code: int) -> Handler:
    """A handler that refuses an opcode which torch's loader does not have."""

    def refuse(_: Machine, pos: int) -> int:
        import pickletools

        found = next((each for each in pickletools.opcodes if each.code == chr(code)), None)
        name = f"{found.name} of protocol {found.proto}" if found is not None else f"{code}"
        again = "; protocol 2 has none of these" if found is not None and found.proto > 2 else ""
        raise _RefusedError(f"its pickle has the opcode {name} (byte {pos - 1}), which torch does not read{again}")

    return refuse


_PLAIN = b"(t\x85\x86\x87N\x88\x89)]}\x8fJKMGXhjqr\x8a\x80."
"""The opcodes without rules of their own."""

_LOADING: list[Handler] = [
    _OVER.get(bytes((code,))) or (OPCODES[code] if code in _PLAIN else _unsupported(code)) for code in range(256)
]
"""Every opcode, as torch's loader follows it."""
