"""The engine of `scan`: everything that the pickles of a file would import and do if something else loaded it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import field
from itertools import chain, islice

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.errors import FormatError, MalformedError, UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.files.places import (
    files_below,
    folder_of,
    is_folder,
    is_listed,
    is_plain_name,
    join,
    name_of,
    open_file,
    place_of,
    present,
)
from ckpt_cli.files.unchanged import open_to_scan, unchanged
from ckpt_cli.formats import signatures
from ckpt_cli.formats.sharded.names import is_index
from ckpt_cli.formats.signatures import documented, is_lfs_pointer
from ckpt_cli.ops.check.finding import Finding
from ckpt_cli.pickles.graph import Inline, RawString
from ckpt_cli.scanner.calls import Use, behaviours_of, loaded_by, uses_of
from ckpt_cli.scanner.packed import decodings, is_container, packing_of
from ckpt_cli.scanner.streams import Found, Oddity, Walk, inside_string, is_pickle
from ckpt_cli.scanner.trace import trace_pickle
from ckpt_cli.scanner.walk import guess, search, walk, walker_of
from ckpt_cli.scanner.weights_only import WeightsOnly

_SEVERITY = {"dangerous": ("error", "dangerous-global"), "unusual": ("warning", "unusual-global"),
             "unknown": ("note", "unknown-global")}  # fmt: skip
"""The severity and code for a verdict on a name; other verdicts are not findings."""

_UNREADABLE = {"broken-zip", "trailing-data"}
"""The codes for a zip file that could not be read at all."""

_INDEX = 256 * 2**20
"""Bytes of an index of shards that is read."""


@dataclass(frozen=True, slots=True)
class Named:
    """One name that a pickle would import."""

    where: str
    name: str
    verdict: str
    """`allowed` by torch's weights_only loader, `harmless`, `dangerous`, `unusual` or `unknown`."""
    call: str
    """The first call that it feeds; empty where it feeds no call."""


@dataclass(slots=True)
class Scan:
    """The result of a scan."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    globals: list[Named] = field(default_factory=list)
    pickles: int = 0
    """Pickles read."""
    weights_only: WeightsOnly = field(default_factory=WeightsOnly)
    """The answers of torch's weights_only loader."""
    allowed: int = 0
    """The number of findings that were taken out because the user allowed them."""
    known: int = 0
    """The number of findings that were taken out because they are in the baseline."""

    @property
    def ok(self) -> bool:
        """True if there is nothing but notes."""
        return not self.count("error") and not self.count("warning")

    def count(self, severity: str) -> int:
        """Findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def rows(self) -> list[dict[str, str]]:
        """Return the findings as rows, for a DataFrame."""
        return [finding.facts() for finding in self.findings]


def scan(path: str, *, loads: bool = True) -> Scan:
    """Scan a file, an index of shards or a directory; nothing is run, and no reader of ours need accept it.

    Unless `loads`, torch's weights_only loader is not asked about.
    Raises OSError where it cannot be read, and a FormatError where it is nothing that could hold a pickle.
    """
    answer = Scan(path)
    worker = _Worker(answer, loads=loads)
    if is_folder(path):
        worker.folder(path)
        if not (worker.budget.files or answer.pickles or answer.findings):
            with suppress(UsageError):  # of several checkpoints in one folder: there are some, and all are clean
                _refuse_unknown(path)
    elif path.endswith(".index.json") or is_index(name_of(path)):
        worker.index(path)
    else:
        worker.file(path, name_of(path), must=True)
    order = {"error": 0, "warning": 1, "note": 2}
    answer.findings.sort(key=lambda finding: order[finding.severity])
    return answer


class _Worker:
    """One scan under way."""

    def __init__(self, answer: Scan, *, loads: bool) -> None:
        self.answer = answer
        self._loads = loads
        self.budget = ScanBudget()
        self._full = False
        self._path = answer.path
        """The file that is being scanned."""

    def say(self, severity: str, code: str, where: str, message: str, name: str = "") -> None:
        """Add a finding."""
        if len(self.answer.findings) < limits.SCAN_FINDINGS:
            self.answer.findings.append(Finding(severity, code, where, message, name=name, file=self._path))
        elif not self._full:
            self._full = True
            message = "findings beyond the limit are not listed"
            self.answer.findings.append(Finding("error", "too-many", where, message, file=self._path))

    def folder(self, path: str) -> None:
        """Every file of a directory, those of its folders included; of a server without lists, those known."""
        indices = []
        for number, (name, full) in enumerate(_announced(files_below(path))):
            if number >= limits.SCAN_FILES:
                self.say("warning", "not-searched", name, "files beyond the limit were not opened")
                return
            if is_index(name):
                indices.append(full)
            self.file(full, name, must=False)
        if not is_listed(path):
            for index in indices:
                self.index(index)
            self._path = path
            self.say("warning", "not-searched", ".", "its server has no lists: other files in it were not searched")

    def index(self, path: str) -> None:
        """Every shard that an index names."""
        import json

        with closing(open_file(path)) as file:
            if file.size > _INDEX:
                raise MalformedError(f"an index of {file.size} bytes", path=path)
            try:
                weight_map = json.loads(file.read(0, file.size))["weight_map"]
                shards = sorted({str(shard) for shard in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise MalformedError("not an index: it has no weight_map", path=path) from None
        folder = folder_of(path)
        plain = [shard for shard in shards if is_plain_name(shard)]
        there = {shard: join(folder, shard) for shard in present(folder, plain)}
        for _ in _announced(there.items()):
            pass
        for shard in shards:
            if not is_plain_name(shard):
                self.say("error", "outside-folder", shard, "a shard that is not beside its index")
                continue
            try:
                self.file(join(folder_of(path), shard), shard, must=False)
            except FileNotFoundError:
                self.say("warning", "missing-shard", shard, "the index names it, but it is not there")

    def file(self, path: str, where: str, *, must: bool) -> None:
        """One file; one that `must` hold something and is of no known kind is trouble."""
        self._path = path
        try:
            with closing(open_to_scan(path)) as source, unchanged([source]):
                self.budget.opened(source.size)
                if is_lfs_pointer(source.read(0, min(signatures.HEAD, source.size))):
                    if must:
                        _refuse_unknown(path)
                    self.say(
                        "warning", "not-searched", where, "a git LFS pointer: fetch the real file with git lfs pull"
                    )
                    return
                if self._loads:
                    self.answer.weights_only.look(source, where)
                known = walker_of(source, where) is not None
                if known or not must:
                    self._take(walk(source, where, 0, self.budget), 0)
                elif not self._take(guess(source, where, 0, self.budget), 0):
                    _refuse_unknown(path)
                if must and not self.answer.pickles and {item.code for item in self.answer.findings} == _UNREADABLE:
                    _refuse_unknown(path)
        except FormatError:
            if must:
                raise
            self.say("warning", "not-searched", where, "not a regular file")

    def _take(self, items: Walk, depth: int) -> int:
        """Judge what a walk finds; how much that is."""
        number = 0
        for item in items:
            number += 1
            if isinstance(item, Oddity):
                self.say(item.severity, item.code, item.where, item.message)
            else:
                self._judge(item, depth)
        return number

    def _judge(self, found: Found, depth: int) -> None:
        """Report what one pickle would do, then look into its strings."""
        trace, where = found.trace, found.where
        self.answer.pickles += 1
        if trace.problem is not None:
            self.say("warning", "limit" if trace.limited else "broken-pickle", where, trace.problem)
        for use in uses_of(trace):
            self.answer.globals.append(Named(where, use.name, use.verdict, use.call))
            if use.verdict in _SEVERITY:
                severity, code = _SEVERITY[use.verdict]
                self.say(severity, code, where, _use_text(use), use.name)
        for behaviour in behaviours_of(trace):
            self.say(behaviour.severity, behaviour.code, where, behaviour.message, behaviour.name)
        self._nested(found, depth)

    def _nested(self, found: Found, depth: int) -> None:
        """Pickles within the strings of a pickle, and the checkpoints that it loads from bytes of its own."""
        loaded = list(loaded_by(found.trace))
        known = set(map(id, loaded))
        for node in loaded:
            data = self._bytes(node, found)
            inner = f"{found.where} (loaded within)"
            if depth >= limits.SCAN_NESTING or data is None:
                self.say("warning", "not-searched", inner, "a pickle within a pickle that was not opened")
            elif not self._take(walk(MemorySource(data), inner, depth + 1, self.budget), depth + 1):
                self.say("error", "dangerous-global", inner, "it loads bytes that are not a checkpoint")
        if found.trace.unsearched:
            self.say("warning", "not-searched", found.where, f"{found.trace.unsearched} strings that may hide a pickle")
        for node in found.trace.texts:
            if id(node) not in known:
                self._search(node, found, depth)

    def _search(self, node: object, found: Found, depth: int) -> None:
        """Look whether a string is a pickle that imports something."""
        budget = self.budget
        data = self._bytes(node, found)
        if data is None or budget.tries <= 0 or budget.opcodes <= 0:
            self.say("note", "not-searched", found.where, "a string that was not searched for a pickle")
            return
        budget.tries -= 1
        view = memoryview(data)
        if is_container(data) and depth < limits.SCAN_NESTING:
            self._take(walk(MemorySource(data), f"{found.where} (within a string)", depth + 1, budget), depth + 1)
            return
        trace = trace_pickle(view, 0, budget)
        inner = f"{found.where} (within a string)"
        if not (trace.globals or trace.computed) or not is_pickle(trace, view):
            if trace.problem is None and trace.texts and depth < limits.SCAN_NESTING:
                self._nested(Found(inner, trace, view), depth + 1)
            self._packed(data, found, depth)
            self._take(inside_string(view, 1, inner, budget), depth + 1)
            return
        if depth >= limits.SCAN_NESTING:
            self.say("warning", "not-searched", inner, "pickles within pickles within pickles…")
            return
        severity = "warning" if trace.problem is None else "note"
        self.say(severity, "nested-pickle", inner, "a string that is a pickle, for something to load")
        self._judge(Found(inner, trace, view), depth + 1)
        self._take(inside_string(view, trace.end, inner, budget), depth + 1)

    def _packed(self, data: bytes, found: Found, depth: int) -> None:
        """Look whether a string is compressed, or is a text that decodes to a pickle."""
        budget = self.budget
        packing = packing_of(data[: signatures.HEAD])
        contents = [("compressed", data)] if packing is not None else []
        for how, content in chain(contents, decodings(data)):
            inner = f"{found.where} (within a string, {how})"
            if depth >= limits.SCAN_NESTING or budget.tries <= 0:
                self.say(
                    "warning", "not-searched", inner, "it is not decoded: it is nested too deep, or one of too many"
                )
                return
            budget.tries -= 1
            before = len(self.answer.globals)
            self._take(search(MemorySource(content), inner, depth + 1, budget), depth + 1)
            if any(named.verdict not in ("allowed", "harmless") for named in self.answer.globals[before:]):
                self.say("warning", "nested-pickle", inner, "a string that decodes to a pickle, for something to load")

    def _bytes(self, node: object, found: Found) -> bytes | None:
        """The bytes that a string stands for; a str that could be Latin-1 is the bytes it would encode to."""
        if isinstance(node, Inline):
            room = limits.SCAN_BYTES - self.budget.searched
            if node.nbytes > room:
                return None
            self.budget.searched += node.nbytes
            if node.kind == "escaped":
                return _latin(node.unescaped(found.data).decode("utf-8", "surrogatepass"))
            raw = bytes(found.data[node.offset : node.offset + node.nbytes])
            return _latin(raw.decode("utf-8", "surrogateescape")) if node.kind == "str" else raw
        if isinstance(node, RawString):
            return node.raw
        return _latin(node) if isinstance(node, str) else node if isinstance(node, bytes) else b""


def _announced(files: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield names and paths of files; what is looked at first of some that lie elsewhere is fetched together."""
    rest = iter(files)
    while some := list(islice(rest, _TOGETHER)):
        if not place_of(some[0][1]).is_local:
            for _ in documented([open_file(path) for _, path in some]):
                pass
        yield from some


_TOGETHER = 32
"""Files that are announced together."""


def _latin(text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def _use_text(use: Use) -> str:
    """Return the text for a name: the call that it feeds where it does harm, else the name, as calls can be long."""
    named = use.call if use.call and use.verdict != "unknown" else use.name
    return f"{named}: {use.reason}"


def _refuse_unknown(path: str) -> None:
    """Raise what opening the file as a checkpoint raises; one that opens has no pickle."""
    from ckpt_cli.formats import open_checkpoint

    open_checkpoint(path).close()
