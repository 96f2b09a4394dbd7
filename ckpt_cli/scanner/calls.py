"""The calls that a traced pickle makes with the names that it imports, each judged together with the call it feeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Global, Inline, PersistentId, RawString
from ckpt_cli.scanner.judge import Judgement, judge, modern
from ckpt_cli.scanner.trace import Trace

_LINKS = 16
"""Attributes of attributes that are followed from a name."""

_GETATTR = ("builtins.getattr",)
_PARTIAL = ("functools.partial", "_functools.partial")
_REDUCE = ("functools.reduce", "_functools.reduce")
_OR = (("operator", "or_"), ("_operator", "or_"))
_BY_TEXT = ("numpy.core._ufunc_reconstruct", "numpy._core._ufunc_reconstruct")
_NESTED_LOAD = "torch.storage._load_from_bytes"
_NEW = ("new", "new_ex", "inst")

_NO_HARM = Judgement("harmless", "what it is given does no harm")

_SHOWN = 1_000
"""Behaviours of one pickle that are reported one by one."""


@dataclass(frozen=True, slots=True)
class Use:
    """One name, and what becomes of it."""

    name: str
    """The dotted name as the pickle has it."""
    verdict: str
    """As in `Judgement`, but never `depends`."""
    reason: str
    call: str
    """The first call that it feeds, as text; empty where it is not called."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Something that a pickle does beyond importing names and calling them."""

    code: str
    severity: str
    message: str
    name: str = ""
    """The name that is reached; empty where there is none."""


def uses_of(trace: Trace) -> list[Use]:
    """Every name of the pickle, judged, in order of first use."""
    first: dict[Global, Call] = {}
    calls: dict[Global, list[Call]] = {}
    judged = {node: judge(node.module, node.name) for node in trace.globals}
    depending = {node for node, found in judged.items() if found.verdict == "depends"}
    for call in trace.calls:
        func = call.func
        if type(func) is Global:
            first.setdefault(func, call)
            if func in depending:
                calls.setdefault(func, []).append(call)
    loose = set(trace.loose)
    found = []
    for node, judgement in judged.items():
        if node in depending:
            judgement = _depending(node, calls.get(node, ()), handed_on=node in loose)
        text = describe(first[node]) if node in first else ""
        found.append(Use(node.qualified, judgement.verdict, judgement.reason, text))
    return found


def _depending(node: Global, calls: Sequence[Call], *, handed_on: bool) -> Judgement:
    """The judgement of a name that is as harmless as what it is given."""
    if handed_on:
        return Judgement("dangerous", "it is handed on, to be called with anything")
    name = ".".join(modern(node.module, node.name))
    if name in _GETATTR:
        return _worst(map(_of_getattr, calls))
    if name in _BY_TEXT:
        return _worst(map(_of_text, calls))
    check = _bad_partial if name in _PARTIAL else _bad_reduce if name in _REDUCE else _bad_load
    return next((Judgement("dangerous", why) for why in map(check, calls) if why), _NO_HARM)


def _worst(judgements: Iterable[Judgement]) -> Judgement:
    """The judgement of several uses of one name."""
    worst = _NO_HARM
    for judgement in judgements:
        if judgement.verdict == "dangerous":
            return judgement
        if judgement.verdict == "unusual":
            worst = judgement
    return worst


def _of_getattr(call: Call) -> Judgement:
    """The judgement of an attribute; an enum's members (Python 3.11), nested classes and methods are harmless."""
    resolved = resolve(call)
    if resolved is None:
        return Judgement("dangerous", "it takes an attribute of something that only running the pickle would show")
    judgement = judge(*resolved)
    if judgement.verdict == "unusual" and _is_member(*resolved):
        return _NO_HARM
    return judgement


def _is_member(module: str, name: str) -> bool:
    """True for a constant of a class known to be harmless: so Python 3.11.0 to 3.11.3 pickles the members of enums."""
    owner, _, member = name.rpartition(".")
    return member.isupper() and bool(owner) and judge(module, owner).verdict in ("allowed", "harmless")


def _of_text(call: Call) -> Judgement:
    """The judgement of a name that is imported by the text of its module and its own."""
    texts = [
        node if isinstance(node, str) else node.text for node in _arguments(call) if isinstance(node, str | RawString)
    ]
    if len(texts) != 2 or len(_arguments(call)) != 2:
        return Judgement("dangerous", "it imports a name that only running the pickle would show")
    judgement = judge(texts[0], texts[1])
    return judgement if judgement.verdict != "depends" else Judgement("dangerous", f"it imports {'.'.join(texts)}")


def _arguments(call: Call) -> tuple[object, ...]:
    return call.args if isinstance(call.args, tuple) else ()


def _bad_partial(call: Call) -> str | None:
    """Return the reason that a callee is not a plain name; a name is judged for itself."""
    for func in _targets(call):
        resolved = resolve(func)
        if resolved is None and not (isinstance(func, Call) and _is_call_of(func, _PARTIAL)):
            return "it wraps something that only running the pickle would show"
        if resolved is not None and judge(*resolved).verdict in ("dangerous", "depends"):
            return f"it wraps {'.'.join(resolved)}"
    return None


def _bad_reduce(call: Call) -> str | None:
    """Return the reason that it does not make a union of types, as pickles have `int | None`."""
    args = _arguments(call)
    return None if len(args) == 2 and resolve(args[0]) in _OR else "it calls what it is given"


def _targets(call: Call) -> Iterator[object]:
    """Yield the callees of a partial: its first argument, and what each state puts in its place."""
    args = _arguments(call)
    yield args[0] if args else None
    for state in call.states:
        yield state[0] if isinstance(state, tuple) and state else None


def _bad_load(call: Call) -> str | None:
    """Return the reason that nested bytes cannot be looked at; those that can are scanned for themselves."""
    return None if len(list(_loaded(call))) == 1 else "it loads a pickle that only running this one would show"


def loaded_by(trace: Trace) -> Iterator[object]:
    """The nodes of bytes that the pickle itself loads as a checkpoint: bytes, Inline, or str that means Latin-1."""
    names = (*trace.globals, *trace.computed)
    loading = {node for node in names if ".".join(modern(node.module, node.name)) == _NESTED_LOAD}
    for call in trace.calls if loading else ():
        if type(call.func) is Global and call.func in loading:
            yield from _loaded(call)


def _loaded(call: Call) -> Iterator[object]:
    args = _arguments(call)
    node = args[0] if len(args) == 1 else None
    if isinstance(node, Call) and _is_call_of(node, ("_codecs.encode",)):
        node = _as_latin(_arguments(node))
    if isinstance(node, bytes | str | RawString | Inline):
        yield node


def _as_latin(args: tuple[object, ...]) -> object:
    """The text that is encoded as Latin-1, as protocol 2 has bytes; None where any other bytes may come of it."""
    if len(args) != 2 or args[1] not in ("latin1", "latin-1"):
        return None
    text = args[0]
    if isinstance(text, RawString):
        return text if text.raw.isascii() else None  # else the loader's encoding decides what it is
    return text if isinstance(text, str) or (isinstance(text, Inline) and text.kind in ("str", "escaped")) else None


def resolve(node: object) -> tuple[str, str] | None:
    """The name that a node stands for: a global, or plain attributes of one; None where it is anything else."""
    attributes: list[str] = []
    for _ in range(_LINKS):
        if isinstance(node, Global):
            name = ".".join([node.name, *reversed(attributes)])
            return node.module, name
        if isinstance(node, PersistentId) and isinstance(node.pid, tuple) and node.pid[:1] == ("module",):
            node = node.pid[1] if len(node.pid) > 1 else None  # torch's legacy format refers to classes so
        elif isinstance(node, Call) and _is_call_of(node, _GETATTR):
            attribute = _attribute(node)
            if attribute is None:
                return None
            attributes.append(attribute)
            node = node.args[0] if isinstance(node.args, tuple) else None
        elif isinstance(node, Call) and attributes and node.opcode in _NEW:
            node = node.func  # an attribute of an object is one of its class
        else:
            return None
    return None


def _attribute(call: Call) -> str | None:
    """The attribute that a call of getattr takes; None where that is not plain."""
    args = call.args
    if not isinstance(args, tuple) or len(args) != 2:
        return None
    name = args[1].text if isinstance(args[1], RawString) else args[1]
    return name if isinstance(name, str) and name.isidentifier() else None


def _is_call_of(call: Call, names: tuple[str, ...]) -> bool:
    func = call.func
    return type(func) is Global and ".".join(modern(func.module, func.name)) in names


def behaviours_of(trace: Trace) -> Iterator[Behaviour]:
    """Yield what the pickle does besides plain calls that no ordinary checkpoint does."""
    for node in trace.computed[:_SHOWN]:
        yield Behaviour("computed-name", "error", f"imports a name that it computes: {node.module} {node.name}")
    for code in dict.fromkeys(trace.extensions[:_SHOWN]):
        yield Behaviour("extension", "warning", f"imports whatever copyreg's extension code {code} stands for")
    for doing, target, _ in trace.changes[:_SHOWN]:
        severity = "error" if resolve(target) is not None else "warning"
        yield Behaviour("changes-import", severity, f"{doing} {describe(target)}, which it did not make")
    shown = 0
    for call in trace.calls:
        if type(call.func) is not Global:
            behaviour = _computed_call(call)
            if behaviour is not None and shown < _SHOWN:
                shown += 1
                yield behaviour
        if (call.states or call.pairs or call.items) and _is_call_of(call, _GETATTR):
            yield Behaviour("changes-import", "error", f"changes {describe(call)}, which it did not make")


def _computed_call(call: Call) -> Behaviour | None:
    """Return the behaviour of a call of something that is not a name; None where it amounts to one."""
    func = call.func
    resolved = resolve(func)
    if resolved is not None:
        judgement = judge(*resolved)
        if judgement.verdict not in ("dangerous", "depends"):
            return None
        message = f"{describe(call)}: {judgement.reason}"
        return Behaviour("dangerous-global", "error", message, ".".join(resolved))
    if isinstance(func, Call) and _is_call_of(func, _PARTIAL):
        return Behaviour("computed-call", "warning", f"calls what functools.partial made: {describe(call)}")
    return Behaviour("computed-call", "warning", f"calls something that it computes: {describe(call)}")
