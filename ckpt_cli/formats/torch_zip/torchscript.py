"""TorchScript archives (torch.jit.save): a pickled object of scripted classes, their code, and a record a storage.

Sources: torch/csrc/jit/serialization/export_module.cpp (`ScriptModuleSerializer`), import.cpp and pickler.cpp;
torch/jit/_pickle.py has the calls that say a container's type. Nothing of the code is run: of it only the lines are
read by which a class declares its parameters and buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages
from ckpt_cli.formats.zip.read import Record, ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor
from ckpt_cli.pickles.flatten import entries_of, objects_of, top_level_of
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph
from ckpt_cli.pickles.tensors.storages import StorageFinder

NAME = "torchscript"

_WRAPPERS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
"""Calls of torch.jit._pickle whose first argument is their value."""

_WRAPPED = 8
"""The most times that a value is wrapped; torch does it twice."""

_DECLARATION = re.compile(r"^(?:class (\w+)\(.*|  __(parameters|buffers)__ = \[(.*)\]) *$", re.MULTILINE)
"""The lines of the code that python_print.cpp (`emitClass`) writes in front of a class's attributes."""

_QUOTED = re.compile(r'"([^"\\]*)"')

_CODE = "__torch__"
"""The package that all scripted classes lie in."""


class _Scripted:
    """The conventions of TorchScript: typed lists and dicts are wrapped, the code says what is a parameter."""

    def __init__(self, records: ZipRecords, prefix: str, graph: Graph) -> None:
        self._records = records
        self._prefix = prefix
        self._wanted = {node.name for node in graph.globals if node.module.startswith(_CODE)}
        """The classes that the pickle has objects of."""
        self._modules: dict[str, dict[str, dict[str, str]]] = {}
        """The kinds of attributes, by module and class."""

    def unwrap(self, node: Call) -> object:
        """The list or dict that a call only says the type of."""
        return unwrapped(node)

    def kinds(self, node: Call) -> Mapping[str, str]:
        """Return the kinds of attributes that an object's class declares."""
        func = node.func
        if not isinstance(func, Global) or not func.module.startswith(_CODE):
            return {}
        classes = self._modules.get(func.module)
        if classes is None:
            classes = self._modules[func.module] = self._declared(func.module)
        return classes.get(func.name, {})

    def _declared(self, module: str) -> dict[str, dict[str, str]]:
        """Return what the classes of a module declare; nothing where its code is missing or far too long."""
        record = self._records.by_name.get(f"{self._prefix}code/{module.replace('.', '/')}.py")
        budget = current()
        if record is None or not budget.affords((self, "code"), record.nbytes, limits.SCRIPT_CODE):
            return {}
        text = bytes(self._records.read(record.name, limits.SCRIPT_CODE)).decode("utf-8", "replace")
        classes: dict[str, dict[str, str]] = {}
        kinds: dict[str, str] = {}
        for match in _DECLARATION.finditer(text):
            name, group, listed = match.groups()
            if name:
                kinds = classes.setdefault(name, {}) if name in self._wanted else {}
            elif listed and budget.affords((self, "declarations"), len(listed), limits.SCRIPT_DECLARED):
                kinds.update(dict.fromkeys(_QUOTED.findall(listed), group.removesuffix("s")))
        return classes


def unwrapped(node: object) -> object:
    """Return the list or dict that a call only says the type of; any other node as it is."""
    found = node
    for _ in range(_WRAPPED):
        if not isinstance(found, Call) or not _is_wrapper(found.func):
            break
        if not isinstance(found.args, tuple) or not found.args:
            break
        found = found.args[0]
    return found


def _is_wrapper(func: object) -> bool:
    return isinstance(func, Global) and func.module == "torch.jit._pickle" and func.name in _WRAPPERS


def read_records(records: ZipRecords, prefix: str) -> Checkpoint:
    """Open a TorchScript archive: names are dotted attribute paths, as its state_dict has them.

    Tensors that its code has in it come last, under the name that the code calls them by: `CONSTANTS.c0`; then those
    that the bytecode for mobile has in it.
    """
    storages = ZipStorages(records)
    saved = SavedPickle(storages, records, prefix)
    graph = saved.graph()
    entries = entries_of(graph, saved, _Scripted(records, prefix, graph))
    constants = _Constants(SavedPickle(storages, records, prefix, pickle="constants", label="constants/"))
    version = saved.version
    return Checkpoint(
        path=storages.path,
        format=NAME,
        entries=[*entries, *constants.entries(), *_in_bytecode(storages, records, prefix, constants)],
        container=storages,
        version=f"TorchScript archive, version {version or 'not given'}{_built(records, prefix)}",
        metadata=_extra_files(records, prefix),
        objects=[name for name in objects_of(graph) if not name.startswith("torch.jit._pickle.")],
        top_level=top_level_of(graph) or _attributes(graph),
        document=graph,
    )


def _built(records: ZipRecords, prefix: str) -> str:
    return ", with bytecode for mobile" if f"{prefix}bytecode.pkl" in records.by_name else ""


def _attributes(graph: Graph) -> list[str]:
    """The outermost attributes, where the pickle holds an object."""
    states = graph.root.states[:1] if isinstance(graph.root, Call) else ()
    return [key for state in states for key in getattr(state, "pairs", [])[::2] if isinstance(key, str)]


class _Constants:
    """The constants of the code, with the records of its tensors, which the bytecode for mobile refers to as well."""

    def __init__(self, saved: SavedPickle) -> None:
        self._saved = saved
        self.big_endian = saved.big_endian
        self._found: dict[str, Storage] = {}

    def entries(self) -> list[Entry]:
        """The items of the tuple in `constants.pkl`, which the code calls `CONSTANTS.c0` and so on."""
        graph = self._saved.graph()
        if isinstance(graph.root, list | tuple) and not graph.root:
            return []
        entries = entries_of(graph, self, _Scripted(self._saved.records, self._saved.prefix, graph))
        return [replace(entry, name=f"CONSTANTS.c{entry.name}") for entry in entries]

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage of a record: one for all that refer to it."""
        found = self._found.get(key)
        if found is None or found.nbytes != nbytes:
            found = self._found[key] = self._saved.find(key, nbytes, location)
        return found


def _in_bytecode(storages: ZipStorages, records: ZipRecords, prefix: str, constants: _Constants) -> Iterator[Entry]:
    """The tensors among the constants of each method in `bytecode.pkl`: `BYTECODE.`, the method, and a position.

    Source: torch/csrc/jit/serialization/export_module.cpp (`exportMethodsToBytecode`); their records are those of
    the code's constants, in old files they have a folder of their own.
    """
    if f"{prefix}bytecode.pkl" not in records.by_name:
        return
    own = SavedPickle(storages, records, prefix, pickle="bytecode", label="bytecode/")
    graph = own.graph()
    if not graph.persistent or not isinstance(graph.root, tuple):
        return
    pairs: list[object] = []
    for method in graph.root[1:]:
        if isinstance(method, tuple) and len(method) > 1 and isinstance(method[1], tuple):
            items = [item for item in method[1] if isinstance(item, tuple) and len(item) == 2]
            pairs += [part for key, found in items if key == "constants" for part in (method[0], found)]
    apart = any(name.startswith(f"{prefix}bytecode/") for name in records.by_name)
    finder: StorageFinder = own if apart else constants
    for entry in entries_of(replace(graph, root=Dict(pairs)), finder, _Scripted(records, prefix, graph)):
        if isinstance(entry, Tensor):
            yield replace(entry, name=f"BYTECODE.{entry.name}")


def _extra_files(records: ZipRecords, prefix: str) -> dict[str, str]:
    """Return the `_extra_files` beside the model: short text as it is, the rest by its size."""
    folder, left = f"{prefix}extra/", limits.SCRIPT_EXTRA
    found = {}
    for name, record in records.by_name.items():
        if name.startswith(folder):
            text = _text(records, record) if record.nbytes <= min(left, limits.ZIP_NOTE_RECORD) else None
            left -= len(name) + (record.nbytes if text is not None else 0)
            found[name.removeprefix(folder)] = f"<{record.nbytes} bytes>" if text is None else text
        if left < 0:
            break
    return found


def _text(records: ZipRecords, record: Record) -> str | None:
    try:
        return bytes(records.read(record.name, limits.ZIP_NOTE_RECORD)).decode()
    except UnicodeDecodeError:
        return None
