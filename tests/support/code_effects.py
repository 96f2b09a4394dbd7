"""What a function does, or what unpickling calls of a class: does it open, run, load, remove or import something?

Decided from bytecode, without a call. Names are resolved through the globals of a function, the attributes of modules
and of `self`, a few calls deep. What cannot be resolved is judged by its name.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

DEPTH = 3
"""Calls that are followed from a function."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_HARMFUL_MODULES = _words(
    "os posix nt subprocess _posixsubprocess shutil socket _socket ssl ctypes _ctypes importlib importlib._bootstrap "
    "importlib.util runpy pickle _pickle marshal multiprocessing multiprocessing.shared_memory tempfile urllib.request "
    "requests httpx fsspec zipfile tarfile gzip bz2 lzma mmap sqlite3 dbm shelve pty code codeop imp io _io glob "
    "pkgutil zipimport webbrowser http.client ftplib smtplib asyncio signal _thread threading joblib cloudpickle dill "
    "torch.hub torch.package torch.utils.cpp_extension torch.jit sys"
)
"""Modules whose functions are an effect, but for those in `_PURE`."""

_PURE = _words(
    "os.fspath os.environ os.getenv os.getpid os.path os.sep os.name os.PathLike os.cpu_count io.StringIO io.BytesIO "
    "_io.StringIO _io.BytesIO sys.version_info sys.platform sys.maxsize sys.byteorder sys.float_info sys.getsizeof "
    "sys.stdout sys.stderr sys.exc_info sys.getrefcount sys._getframe sys.intern sys.version sys.getrecursionlimit "
    "posix.getcwdb posix.getcwd posix.getpid posix.cpu_count posix.urandom sys.excepthook posix.stat posix.getuid "
    "importlib.util.find_spec sys.implementation sys.flags sys.is_finalizing sys.hash_info threading.Lock "
    "threading.RLock threading.local threading.Event threading.Condition threading.get_ident _thread.allocate_lock "
    "threading.current_thread _thread.RLock _thread.get_ident _thread._local _thread.lock pickle.PickleError "
    "pickle.PicklingError posix.fspath ctypes.sizeof ctypes.c_int ctypes.c_void_p ctypes.c_double sys.modules "
    "torch.jit.is_scripting torch.jit.is_tracing torch.jit.annotate torch.jit._trace.is_tracing torch.jit.Future"
)
"""What these modules have besides."""

_PLAIN = _words("typing typing_extensions enum abc copy functools collections re warnings inspect dataclasses weakref")
"""Modules of the standard library whose functions are not followed; what they take from elsewhere is named there."""

_HARMFUL = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": "eval exec compile open __import__ breakpoint",
        "torch": "load save from_file",
        "torch.serialization": "load save _load _legacy_load _save",
        "torch.storage": "_load_from_bytes",
        "numpy": "load save savez fromfile memmap loadtxt genfromtxt savetxt DataSource",
        "pandas": "read_pickle eval read_csv read_table",
        "operator": "attrgetter methodcaller",
        "logging": "FileHandler",
        "types": "FunctionType CodeType",
        "dataclasses": "make_dataclass",
        "yaml": "load unsafe_load full_load",
    }.items()
    for name in names.split()
)
"""Single functions that are an effect."""

_HARMFUL_ATTRIBUTES = _words(
    "system popen Popen check_output check_call getoutput spawnv execv fork unlink rmtree rmdir write_text write_bytes "
    "read_text read_bytes import_module load_module exec_module __import__ CDLL LoadLibrary load_library dlopen "
    "urlopen urlretrieve create_connection tofile fromfile memmap from_file run_path run_module runcode set_trace "
    "copyfile copytree mkstemp mkdtemp loads exec_ sympify parse_expr lambdify hf_hub_download snapshot_download "
    "__globals__ __builtins__ __subclasses__ from_pretrained"
)
"""Attributes that are an effect whatever they are taken from."""

REVIEWED = {
    "numpy.core._ufunc_reconstruct": "imports what its arguments say, and is judged by them",
    "numpy._core._ufunc_reconstruct": "imports what its arguments say, and is judged by them",
    "torch.storage._load_from_bytes": "loads a pickle that is within this one, and is judged by its bytes",
    "numpy.lib._nanfunctions_impl.nanmax": "compares a type with memmap",
    "numpy.lib._nanfunctions_impl.nanmin": "compares a type with memmap",
    "sklearn.metrics._ranking.auc": "compares a type with memmap",
    "torch.nn.functional.pad": "imports torch._decomp",
    "torch.nn.functional.max_pool3d_with_indices": "imports torch._decomp",
    "torch.nn.functional.interpolate": "imports torch._decomp",
    "networkx.utils.decorators.argmap._lazy_compile": "compiles wrappers of functions of networkx",
    "networkx.utils.decorators.argmap.compile": "compiles wrappers of functions of networkx",
    "accelerate.utils.environment.check_cuda_fp8_capability": "runs nvidia-smi",
    "shutil.get_terminal_size": "only looks",
    "posixpath.normpath": "only changes text",
    "zoneinfo._zoneinfo.ZoneInfo.__new__": "reads the system's file of a time zone, whose name it checks",
    "logging.getLogger": "makes a logger, without a handler",
}
"""Functions that have an effect and do no harm, with the reason; they are not followed."""

_CALLED = tuple(
    name
    for names in (
        "__new__ __init__ __setstate__ __setattr__ __getattr__ __getattribute__ __setitem__ __call__ __del__ __hash__ "
        "__eq__ __init_subclass__ __set_name__ __class_getitem__ __post_init__ __setstate_cython__ __iter__ __len__ "
        "append extend add update",
    )
    for name in names.split()
)
"""Methods that unpickling may call: to make an object, to give it state and items, to use it as a key, to drop it."""


_clean: dict[object, int] = {}
"""Values and methods in which no effect was seen, with the number of calls that were followed from them."""


def effect(value: object, depth: int = DEPTH) -> str | None:
    """Return the first effect that calling a value may have, with the way to it; None where none is seen."""
    return next(_effects(value, depth, set()), None)


def _effects(value: object, depth: int, seen: set[object]) -> Iterator[str]:
    named = _named(value)
    if depth < 0 or id(value) in seen or _clean.get(id(value), -1) >= depth or named in _PURE or named in REVIEWED:
        return
    seen.add(id(value))
    found = False
    for line in _of_value(value, named, depth, seen):
        found = True
        yield line
    if not found:
        _clean[id(value)] = depth


def _of_value(value: object, named: str, depth: int, seen: set[object]) -> Iterator[str]:
    if named in _HARMFUL or (named.rpartition(".")[0] in _HARMFUL_MODULES and callable(value)):
        yield named
    elif getattr(value, "__module__", None) in _PLAIN:
        return
    elif isinstance(value, type):
        yield from _of_class(value, depth, seen)
    elif isinstance(value, types.FunctionType):
        yield from _of_code(value.__code__, value.__globals__, None, depth, seen, named)
        yield from _of_closure(value, depth, seen)
    elif not isinstance(value, types.ModuleType):
        for wrapped in ("func", "__func__", "__wrapped__"):
            yield from _effects(inspect.getattr_static(value, wrapped, None), depth, seen)


def _of_closure(function: types.FunctionType, depth: int, seen: set[object]) -> Iterator[str]:
    for cell in function.__closure__ or ():
        content = None
        with suppress(ValueError):
            content = cell.cell_contents
        if isinstance(content, types.FunctionType):
            yield from _effects(content, depth, seen)


def _named(value: object) -> str:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""


def _of_class(kind: type, depth: int, seen: set[object]) -> Iterator[str]:
    for name in _CALLED:
        places = [place for place in (*kind.__mro__, *type(kind).__mro__) if name in vars(place)]
        if places:
            yield from _of_method(kind, vars(places[0])[name], depth, seen)


def _of_method(kind: type, method: object, depth: int, seen: set[object]) -> Iterator[str]:
    if isinstance(method, staticmethod | classmethod):
        method = method.__func__
    if isinstance(method, property):
        method = method.fget
    if not isinstance(method, types.FunctionType) or _named(method) in REVIEWED:
        return
    method = inspect.unwrap(method)
    if not isinstance(method, types.FunctionType):
        return
    key = (kind, method.__code__)
    if key in seen or _clean.get(key, -1) >= depth:
        return
    seen.add(key)
    found = False
    for line in _of_code(method.__code__, method.__globals__, kind, depth, seen, _named(method)):
        found = True
        yield line
    if not found:
        _clean[key] = depth


def _of_code(
    code: types.CodeType, names: dict[str, Any], kind: type | None, depth: int, seen: set[object], way: str
) -> Iterator[str]:
    """The effects of some code: of what it names, and of what that calls."""
    for value, text in _Reader(names, kind).mentioned(code):
        if value is _UNRESOLVED:
            if text in _HARMFUL_ATTRIBUTES:
                yield f"{way} → .{text}"
        elif not isinstance(value, _Own):
            yield from (f"{way} → {each}" for each in _effects(value, depth - 1, seen))
        elif kind is not None and depth > 0:
            yield from (f"{way} → {each}" for each in _of_method(kind, value.method, depth - 1, seen))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant, names, kind, depth, seen, way)


_UNRESOLVED = object()


class _Own:
    """`self`, or a method of it."""

    def __init__(self, method: object = None) -> None:
        self.method = method


@functools.cache
def _steps(code: types.CodeType) -> list[tuple[str, Any]]:
    """The instructions of some code, as the methods of `_Reader` are named, and their arguments."""
    found = []
    for step in dis.get_instructions(code):
        name = "LOAD_FAST" if step.opname.startswith("LOAD_FAST") else step.opname
        if name not in ("PUSH_NULL", "CACHE", "PRECALL", "EXTENDED_ARG", "RESUME"):
            found.append((f"_{name.lower()}", step.argval))
    return found


class _Reader:
    """Every global, attribute of a module and method of `self` in some code, resolved where possible."""

    def __init__(self, names: dict[str, Any], kind: type | None) -> None:
        self.names = names
        self.kind = kind
        self.value: object = _UNRESOLVED
        self.imported: object = None
        self.local: dict[str, object] = {}

    def mentioned(self, code: types.CodeType) -> Iterator[tuple[object, str]]:
        """Yield each with its name."""
        first = code.co_varnames[0] if code.co_argcount and self.kind is not None else None
        if first is not None:
            self.local[first] = _Own()
        for operation, argument in _steps(code):
            follow = getattr(self, operation, None)
            if follow is None:
                self.value = _UNRESOLVED
            elif follow(argument):
                yield self.value, argument

    def _load_global(self, name: str) -> bool:
        self.value = self.names.get(name, vars(sys.modules["builtins"]).get(name, _UNRESOLVED))
        return True

    _load_name = _load_global

    def _load_fast(self, name: object) -> bool:
        self.value = self.local.get(str(name), _UNRESOLVED)
        return False

    def _store_fast(self, name: object) -> bool:
        if self.value is not _UNRESOLVED and not isinstance(self.value, _Own):
            self.local[str(name)] = self.value
        self.value = _UNRESOLVED
        return False

    def _import_name(self, name: str) -> bool:
        try:
            self.imported = sys.modules.get(name) or importlib.import_module(name, self.names.get("__package__"))
        except Exception:
            self.imported = _UNRESOLVED
        self.value = self.imported
        return False

    def _import_from(self, name: str) -> bool:
        self.value = getattr(self.imported, name, _UNRESOLVED)
        return True

    def _load_attr(self, name: str) -> bool:
        if isinstance(self.value, types.ModuleType | type):
            self.value = inspect.getattr_static(self.value, name, _UNRESOLVED)
        elif isinstance(self.value, _Own) and self.kind is not None:
            found = inspect.getattr_static(self.kind, name, _UNRESOLVED)
            self.value = _UNRESOLVED if found is _UNRESOLVED else _Own(found)
        else:
            self.value = _UNRESOLVED
        return True

    _load_method = _load_attr
