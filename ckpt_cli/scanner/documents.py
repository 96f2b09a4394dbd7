"""JSON in checkpoints that makes something run: Keras's configurations, exported programs, and pickles in base64.

A document is not parsed as a whole: its strings are gone through one by one, so that one with errors, or with far more
brackets than memory, hides nothing. Sources: keras/src/saving/serialization_lib.py (`deserialize_keras_object`),
torch/_export/serde/serialize.py (`_parse_sym_expr`, `deserialize_operator`), stable_baselines3/common/save_util.py
(`json_to_data`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.facts import dataclass
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.scanner.alphabets import number_lists
from ckpt_cli.scanner.configs import (
    Functions,
    Pairs,
    class_of_module,
    class_path,
    code_of_repository,
    implementation,
    module,
    parts_of_pipeline,
    target,
    template,
    vocabulary,
)
from ckpt_cli.scanner.judge import judge
from ckpt_cli.scanner.packed import DECODING_COSTS, SHORTEST, decodings, may_be_packed
from ckpt_cli.scanner.streams import Inner, Oddity

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)

_STRINGS = 10_000
"""Strings that any document may have; beyond them, one for every six bytes."""

_SHOWN = 100
"""Findings of one document."""

_TEXT = 200
"""Characters of a text that a finding quotes."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A string of a document."""

    value: bytes
    """Its text in UTF-8, escapes undone."""
    key: bytes
    """The key that it is the value of; empty where it is a key itself, or an item of a list."""
    is_key: bool
    begin: int
    end: int


def is_json(head: bytes) -> bool:
    """True for the first bytes of a JSON object or list, in any encoding that Python's `json` detects."""
    return head[:64].removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").lstrip(b"\xff\xfe \t\r\n")[:1] in (b"{", b"[")


def is_wide(head: bytes) -> bool:
    """True for the first bytes of a document in UTF-16 or UTF-32."""
    return b"\0" in head[:4] or head[:2] in (b"\xff\xfe", b"\xfe\xff")


def walk_json(data: memoryview, where: str, depth: int, budget: ScanBudget) -> Iterator[Oddity | Inner]:
    """What a JSON document would make a loader run; nothing, for an ordinary one."""
    room = max(limits.SCAN_BYTES - budget.searched, 0)
    if len(data) > room:
        yield Oddity("warning", "not-searched", where, f"{len(data) - room} bytes of JSON that were not searched")
    text = _utf8(bytes(data[:room]))
    budget.searched += len(text)
    shown = 0
    for item in _findings(text, where, depth, budget):
        if isinstance(item, Oddity):
            shown += 1
            if shown > _SHOWN:
                yield Oddity(item.severity, item.code, where, "more like that, which are not listed")
                return
        yield item


def _utf8(data: bytes) -> bytes:
    """The document in UTF-8: Python's `json` reads UTF-16 and UTF-32 too."""
    encoding = json.detect_encoding(data[:4])
    if encoding.startswith("utf-8"):
        return data
    return data.decode(encoding, "replace").encode("utf-8", "surrogatepass")


def _findings(text: bytes, where: str, depth: int, budget: ScanBudget) -> Iterator[Oddity | Inner]:
    document = _Document(text, where)
    for number, item in enumerate(_strings(text)):
        if number > _STRINGS + len(text) // 6 or budget.opcodes < 0:
            yield Oddity("warning", "not-searched", where, "it has far more strings than are searched")
            return
        yield from document.key(item) if item.is_key else document.value(item)
        if not item.is_key and len(item.value) >= SHORTEST:
            budget.opcodes -= DECODING_COSTS
            yield from _encoded(item, where, depth, budget)
    for how, content in number_lists(text, may_be_packed):
        yield from _decoded(content, f"{where} ({how})", depth, budget)
    if b'"_class_name"' in text:
        yield from parts_of_pipeline(text, where)
    if _TRUST.search(text):
        message = "trust_remote_code: a loader that heeds it runs the code beside it"
        yield Oddity("note", "remote-code", where, message)


_NO_GUARD = re.compile(
    rb"__|[;\n]|\b(?:import|exec|eval|compile|open|lambda|getattr|setattr|globals|locals|vars|os|sys|subprocess|builtins)\b"
)
"""What no condition on sizes has: torch/export/_unlift.py `_convert_guards_code_to_fn` executes these."""

_SUBSCRIPT = re.compile(rb"\['\w{1,200}'\]")
"""The name of an argument in a guard, which may be any word."""

_TRUST = re.compile(rb'"trust_remote_code"\s{0,64}:\s{0,64}true')


class _Document:
    """One document whose strings are gone through."""

    def __init__(self, text: bytes, where: str) -> None:
        self._text = text
        self._where = where
        self._ranges = self._mapped = 0
        self._guards = False
        self._pairs, self._functions = Pairs(), Functions()
        self._of_keras = b'class_name"' in text or b"\\u00" in text

    def key(self, item: _Text) -> Iterator[Oddity]:
        """A key: some begin an object or a list that is looked at."""
        self._guards = item.value == b"guards_code"
        if item.value == b"range_constraints" and item.begin >= self._ranges:
            found = _END_OF_RANGES.search(self._text, item.end)
            self._ranges = found.end() if found else len(self._text)
            yield from _symbols(self._text[item.end : self._ranges], self._where)
        elif item.value == b"auto_map":
            self._mapped = self._text.find(b"}", item.end)

    def value(self, item: _Text) -> Iterator[Oddity]:
        """A string that is not a key."""
        if item.begin < self._mapped:
            yield from code_of_repository(item.value, self._where)
        if self._guards and not item.key and _NO_GUARD.search(_SUBSCRIPT.sub(b"", item.value)):
            said = item.value[:_TEXT].decode("utf-8", "replace")
            yield Oddity(
                "error", "expression", where=self._where, message=f"a guard that torch.export executes: {said}"
            )
        if item.key in _VALUES:
            yield from _VALUES[item.key](item.value, self._where)
        if item.key in (b"__class__", b"__module__"):
            yield from self._pairs.add(item.key, item.value, self._where)
        elif item.key in _NAMES and self._of_keras:
            yield from self._functions.name(item.value, self._where)
        elif item.key == b"module":
            yield from self._functions.module(item.value, self._where)


def _strings(text: bytes) -> Iterator[_Text]:
    """The strings of a document, each with the key that it belongs to."""
    at = text.find(b'"')
    key, key_end = b"", -1
    while at >= 0 and (match := _STRING.match(text, at)):
        end = match.end()
        value = _unescaped(match[0])
        colon = _after_space(text, end)
        is_key = text[colon : colon + 1] == b":"
        owner = key if key_end >= 0 and _after_space(text, key_end) == at else b""
        yield _Text(value, owner, is_key, at, end)
        key, key_end = (value, colon + 1) if is_key else (b"", -1)
        at = text.find(b'"', end)


def _after_space(text: bytes, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


_SPACE = re.compile(rb"[ \t\r\n]*")


def _unescaped(token: bytes) -> bytes:
    if b"\\" not in token:
        return token[1:-1]
    try:
        return str(json.loads(token, strict=False)).encode("utf-8", "surrogatepass")
    except ValueError:
        return token[1:-1]


# --- Keras ------------------------------------------------------------------------------------------------------------


def lambda_layer(where: str) -> Oddity:
    """Return the finding for a Lambda layer of Keras."""
    return Oddity("error", "keras-lambda", where, "a Lambda layer, whose code Keras runs when it loads the model")


_ESCAPED = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
_WIDE = re.compile(rb"c\0{1,3}l\0{1,3}a\0{1,3}s\0{1,3}s\0{1,3}_")
_LAMBDA = re.compile(rb'"class_name"\s{0,64}:\s{0,64}"(?:Lambda|__lambda__)"')


def configurations_within(data: memoryview, where: str, depth: int, budget: ScanBudget) -> Iterator[Oddity]:
    """Lambda layers and such in a file that has configurations of models as texts among other things, such as HDF5."""
    wide = _WIDE.search(data) is not None
    plain = _ESCAPED.sub(lambda match: bytes((int(match[1], 16),)), bytes(data).replace(b"\0", b"") if wide else data)
    if _LAMBDA.search(plain):
        yield lambda_layer(where)
    at = plain.find(b'"class_name"')
    for _ in range(_SHOWN):
        if at < 0:
            break
        begin, end = plain.rfind(b"\0", 0, at) + 1, plain.find(b"\0", at)
        end = end if end > 0 else len(plain)
        yield from (item for item in _findings(plain[begin:end], where, depth, budget) if isinstance(item, Oddity))
        at = plain.find(b'"class_name"', end)


def _class_name(value: bytes, where: str) -> Iterator[Oddity]:
    if value in (b"Lambda", b"__lambda__"):
        yield lambda_layer(where)


# --- exported programs ------------------------------------------------------------------------------------------------

_FUNCTIONS = frozenset(
    b"FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural "
    b"FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt "
    b"RoundDecimal ToFloat Identity Max Min Abs Add Mul Pow Symbol Integer Float Rational Eq Ne Lt Le Gt Ge Not And Or "
    b"Xor Piecewise ExprCondPair Tuple Dummy Interval Range StrictLessThan LessThan StrictGreaterThan GreaterThan "
    b"Equality Unequality Relational floor ceiling sqrt exp log sin cos tan sign abs min max OpaqueUnaryFn_sqrt "
    b"OpaqueUnaryFn_exp OpaqueUnaryFn_log OpaqueUnaryFn_log2 OpaqueUnaryFn_sin OpaqueUnaryFn_cos OpaqueUnaryFn_tan "
    b"OpaqueUnaryFn_tanh OpaqueUnaryFn_sinh OpaqueUnaryFn_cosh OpaqueUnaryFn_asin OpaqueUnaryFn_acos "
    b"OpaqueUnaryFn_atan BitwiseFn_bitwise_and BitwiseFn_bitwise_or BitwiseFn_bitwise_xor TruncDiv".split()
)
"""Functions that occur in the expressions of sizes: those of torch/utils/_sympy/functions.py, and sympy's own."""

_EXPRESSION_BYTES = 1 << 16
"""Bytes of an expression that is looked at; longer ones are reported."""

_TOKEN = re.compile(
    rb"""\s+ | \d+(?:\.\d*)?(?:[eE][+-]?\d+)? | \.\d+(?:[eE][+-]?\d+)? | [-+*/%(),<>=!&|~^]
    | '[A-Za-z0-9_.+-]*' | "[A-Za-z0-9_.+-]*" | ([A-Za-z_]\w*) (\s*\()? """,
    re.VERBOSE,
)


def is_arithmetic(text: bytes) -> bool:
    """True for an expression of numbers, symbols and known functions; sympy evaluates any other as Python."""
    at = 0
    while at < len(text) <= _EXPRESSION_BYTES:
        match = _TOKEN.match(text, at)
        if match is None:
            return False
        name, called = match[1], match[2]
        if name and (b"__" in name or name in (b"lambda", b"import", b"exec", b"eval")):
            return False
        if called and name not in _FUNCTIONS:
            return False
        if name and name in _FUNCTIONS and not called and name not in _PLAIN:
            return False
        at = match.end()
    return at >= len(text)


_PLAIN = frozenset(b"Symbol Integer Float min max abs".split())
"""Of these functions, those whose names may also be values: `min=…`."""


def _expressions(value: bytes, where: str) -> Iterator[Oddity]:
    if not is_arithmetic(value):
        yield _expression(value, where)


def _expression(value: bytes, where: str) -> Oddity:
    said = value[:_TEXT].decode("utf-8", "replace")
    return Oddity("error", "expression", where, f"not arithmetic, and torch.export.load has sympy evaluate it: {said}")


_END_OF_RANGES = re.compile(rb"\}\s{0,64}\}")


def _symbols(ranges: bytes, where: str) -> Iterator[Oddity]:
    """The names of symbols that ranges are for: the keys of an object whose values are flat objects."""
    for item in _strings(ranges):
        if item.is_key and not is_arithmetic(item.value):
            yield _expression(item.value, where)


_OPERATORS = ("torch.ops.", "torch.sym_", "torch._sym_", "torch._higher_order_ops.", "torch.autograd._profiler_")


def _target(value: bytes, where: str) -> Iterator[Oddity]:
    """What a node of an exported program calls: an operator, or anything that is an attribute of torch."""
    target = value.decode("utf-8", "replace")
    if not target.startswith("torch."):
        yield from class_path(value, where)
        return
    if len(target) > 512 or not re.fullmatch(r"[\w.]+", target):
        return
    if target.startswith(_OPERATORS):
        from ckpt_cli.scanner.scripts import effect_of

        namespace, _, name = target.removeprefix("torch.ops.").partition(".")
        why = effect_of(namespace, name.partition(".")[0]) if target.startswith("torch.ops.") else None
        if why:
            yield Oddity("error", "script-effect", where, f"the program calls {target}, which {why}")
        return
    module, _, name = target.rpartition(".")
    judgement = judge(module, name)
    if judgement.verdict == "dangerous":
        yield Oddity("error", "script-effect", where, f"the program calls {target}: {judgement.reason}")


_VALUES: dict[bytes, Callable[[bytes, str], Iterator[Oddity]]] = {
    b"class_name": _class_name,
    b"expr_str": _expressions,
    b"target": _target,
    b"_target_": target,
    b"class_path": class_path,
    b"type": class_of_module,
    b"parent_library": module,
    b"impl": implementation,
    b"chat_template": template,
    b"template": template,
    b"vocabulary": vocabulary,
}
"""What is looked at in the values of some keys."""

_NAMES = (b"class_name", b"config", b"registered_name", b"function")
"""Keys whose values Keras takes for names of functions, in a document that has classes."""


# --- pickles in base64 ------------------------------------------------------------------------------------------------


def _encoded(item: _Text, where: str, depth: int, budget: ScanBudget) -> Iterator[Inner]:
    """What a string decodes to, as stable-baselines3 keeps pickles below `:serialized:`."""
    name = item.key.decode("utf-8", "replace")[:_TEXT]
    if item.value.count(b"\n") > 1 and may_be_packed(item.value):
        yield from _decoded(item.value, f"{where} ({name})" if name else where, depth, budget)
    for _how, content in decodings(item.value):
        yield from _decoded(content, f"{where} ({name})" if name else where, depth, budget)


def _decoded(content: bytes, where: str, depth: int, budget: ScanBudget) -> Iterator[Inner]:
    if budget.tries > 0:
        budget.tries -= 1
        yield Inner(MemorySource(content), where, depth + 1, numbers=True)
