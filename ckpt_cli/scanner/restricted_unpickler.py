"""The machine of torch's restricted unpickler, the one of `torch.load(weights_only=True)`, on inert nodes.

It has torch's rules for each opcode (torch 2.13, torch/_weights_only_unpickler.py). Where torch would stop at a name
that it does not know, this goes on as if `torch.serialization.add_safe_globals` had been given it, so that all the
names are found at once.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, PersistentId, RawString
from ckpt_cli.pickles.machine import Handler, Machine, Table, entering
from ckpt_cli.pickles.opcodes.push import Stopped
from ckpt_cli.pickles.read import OPCODES, WITH_ROWS
from ckpt_cli.pickles.rows import Rows
from ckpt_cli.scanner.allowlist import ALLOWED
from ckpt_cli.scanner.calls import resolve

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


BROKEN = "its pickle is broken"
"""How the reason begins that no name would change: it cannot be read, or ends too early."""


class _RefusedError(FormatError):
    """Torch's loader would stop here, whatever names it were allowed."""


class RestrictedUnpickler(Machine):
    """The machine of one pickle, which remembers the names that torch would ask for."""

    __slots__ = ("_found", "end", "legacy", "needed", "root")

    def __init__(self, data: bytes | memoryview, *, legacy: bool = False) -> None:
        super().__init__(data)
        self.legacy = legacy
        """True for a pickle of the format of before torch 1.6."""
        self.needed: dict[str, None] = {}
        self._found: dict[Global, Global] = {}
        """What each name stands for; names are hashed by identity."""
        self.root: object = None
        self.end = 0
        """The byte after STOP."""

    def load(self, pos: int) -> str:
        """Follow the pickle that begins at a byte; returns the reason that torch refuses it, empty where it does not.

        Raises LimitError where the pickle is beyond the limits.
        """
        data, blocks = self.data, sys.getallocatedblocks() + limits.PICKLE_BLOCKS
        rows = self.rows = Rows(blocks)  # whose names were all met before, and noted
        try:
            for done in range(0, limits.PICKLE_OPCODES, _CHECK_EVERY):
                if done + rows.opcodes > limits.PICKLE_OPCODES:
                    break
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
            return f"{BROKEN} (byte {pos})"
        if not self.stack:
            return f"{BROKEN} (byte {pos})"
        self.root = self.stack.pop()
        return ""

    def found(self, read: Global) -> Global:
        """Return the name that one in the pickle stands for, noted where torch does not know it."""
        node = self._found.get(read)
        if node is None:
            module, name = _NAMES.get((read.module, read.name)) or (_MODULES.get(read.module, read.module), read.name)
            if module in _BLOCKED:
                raise _RefusedError(f"it names {module}.{name}, and torch refuses every name of {module}")
            node = read if module == read.module and name == read.name else self.name(module, name)
            self._found[read] = node
            self.need(node.qualified)
        return node

    def need(self, name: str) -> None:
        """Note a name that torch does not know by default."""
        if name not in ALLOWED:
            self.needed.setdefault(name)


# --- the opcodes that torch has rules for -----------------------------------------------------------------------------

_OVER: Table = {}

_enter = entering(_OVER)


def _unpickler(m: Machine) -> RestrictedUnpickler:
    assert isinstance(m, RestrictedUnpickler)
    return m


@_enter(b"c")
def _global(m: Machine, pos: int) -> int:
    read, pos = m.named(pos)
    m.stack.append(_unpickler(m).found(read))
    return pos


def _named(m: Machine, func: object, doing: str) -> None:
    """Note the name of a callee, which may be an attribute of a class; refuse what has none."""
    found = resolve(func)
    if found is None:
        raise _RefusedError(f"it {doing} {describe(func)}, which has no name that could be allowed")
    _unpickler(m).need(".".join(found))


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
        _unpickler(m).need(kind)
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
    if type(parts[1]) is Global and parts[1].name == "UntypedStorage" and _unpickler(m).legacy:
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
    _OVER.get(bytes((code,))) or (WITH_ROWS[code] if code in _PLAIN else _unsupported(code)) for code in range(256)
]
"""Every opcode, as torch's loader follows it."""
