"""The reader of pickles against CPython's own: pickle.loads says what every opcode means."""

from __future__ import annotations

import codecs
import collections
import io
import pickle
import pickletools
import warnings
from fractions import Fraction
from typing import Any

import pytest
from examples import most
from hypothesis import example, given, settings
from hypothesis import strategies as st
from unpickle import Maker

from ckpt_cli.errors import CkptError, MalformedError, TruncatedError
from ckpt_cli.pickles.graph import Extension, RawString
from ckpt_cli.pickles.read import read_pickle

PROTOCOLS = range(6)


class Point:
    """An instance with attributes."""

    def __init__(self, x: int = 0, y: int = 0) -> None:
        self.x, self.y = x, y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Slotted:
    """An instance with slots, whose state is a pair."""

    __slots__ = ("a",)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and self.a == other.a

    __hash__ = None  # type: ignore[assignment]


class Keyword:
    """An instance whose `__new__` takes a keyword."""

    def __new__(cls, *, n: int) -> Keyword:
        made = super().__new__(cls)
        made.n = n  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"n": self.n}  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyword) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


BUFFER = b"out of band"


class Unpickler(pickle.Unpickler):
    """CPython's, with persistent ids that are pairs."""

    def persistent_load(self, pid: Any) -> Any:
        return "persistent", pid


def loaded(data: bytes) -> Any:
    """What CPython makes of a pickle."""
    return Unpickler(io.BytesIO(data), buffers=[bytearray(BUFFER)] * 9, encoding="latin-1").load()


def read(data: bytes) -> Any:
    """What our graph stands for."""
    return Maker(data, buffers=[bytearray(BUFFER)] * 9, encoding="latin-1").make(read_pickle(data).root)


def same(one: Any, other: Any) -> bool:
    """Whether two objects are equal and of equal types, NaN and sign of zero included, whatever a set's order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, set | frozenset):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    if isinstance(one, float | complex):
        return repr(one) == repr(other)
    return bool(one == other)


HERE = __name__.encode()

EXAMPLES = {
    "INT": b"(I0\nI-7\nI00\nI01\nI123456789012345678901234567890\nt.",
    "LONG": b"(L0L\nL-12345678901234567890L\nL7\nt.",
    "BININT": b"(J\xff\xff\xff\xffJ\0\0\0\x80J\1\0\0\0K\0K\xffM\xff\xffM\0\1t.",
    "LONG1": b"(\x8a\0\x8a\1\xff\x8a\2\xff\0\x8a\x09" + b"\x80" * 9 + b"t.",
    "LONG4": b"\x8b\5\0\0\0\1\2\3\4\x85.",
    "FLOAT": b"(F1.5\nF-0.0\nFnan\nF-inf\nt.",
    "BINFLOAT": b"(G?\xf8\0\0\0\0\0\0G\x7f\xf8\0\0\0\0\0\1G\x80\0\0\0\0\0\0\0t.",
    "STRING": b"(S'it\\'s'\nS\"\\x41\\n\\101\\\\\"\nS'\\q'\n  t.".replace(b"\n  t", b"\nt"),
    "BINSTRING": b"(T\3\0\0\0a\xffbU\2\xe9\0t.",
    "UNICODE": b"(V\\u20ac \\U0001f600 \xe9\nV\nt.",
    "BINUNICODE": b"(X\4\0\0\0\xf0\x9f\x98\x80X\3\0\0\0\xed\xa0\x80\x8c\1a\x8d\2\0\0\0\0\0\0\0\xc3\xa9t.",
    "BINBYTES": b"(B\2\0\0\0\0\xffC\1a\x8e\1\0\0\0\0\0\0\0b\x96\1\0\0\0\0\0\0\0ct.",
    "BUFFERS": b"(\x97\x97\x98t.",
    "CONSTANTS": b"(N\x88\x89)t.",
    "TUPLES": b"(K\1\x85K\1K\2\x86K\1K\2K\3\x87(t)t.",
    "LISTS": b"(](K\1K\2eK\3a(K\4l](et.",
    "DICTS": b"(}K\1K\2s(K\3NK\4Nu(K\1K\2d}(ut.",
    "SETS": b"(\x8f(K\1K\2\x90(K\1K\2\x91\x8f(\x90t.",
    "STACK": b"(K\1(0K\x0920K\2(N(NN11t.",
    "MEMO": b"(]q\0p1\nr\2\0\0\0h\0g1\nj\2\0\0\0t.",
    "MEMO_OVERWRITTEN": b"(K\1q\0K\2q\0h\0t.",
    "MEMO_FROM_1": b"(]q\1]q\2h\1h\2t.",
    "MEMO_OUT_OF_ORDER": b"(]r\xff\0\1\0]q\0]q\1j\xff\0\1\0h\0h\1t.",
    "MEMOIZE": b"\x80\4(]\x94]\x94h\0h\1t.",
    "GLOBAL": b"(cfractions\nFraction\n\x8c\x09fractions\x8c\x08Fraction\x93t.",
    "GLOBAL_OF_PYTHON_2": b"(U\x09fractionsU\x08Fraction\x93t.",
    "REDUCE": b"cfractions\nFraction\n(K\1K\2tR.",
    "BUILD": b"c" + HERE + b"\nPoint\n)\x81}(X\1\0\0\0xK\1X\1\0\0\0yK\2ub.",
    "BUILD_TWICE": b"c" + HERE + b"\nPoint\n)R}X\1\0\0\0xK\1sb}X\1\0\0\0yK\2sb.",
    "INST": b"(K\1K\2i" + HERE + b"\nPoint\n.",
    "OBJ": b"(c" + HERE + b"\nPoint\nK\1K\2o.",
    "NEWOBJ_EX": b"c" + HERE + b"\nKeyword\n)}X\1\0\0\0nK\1s\x92.",
    "PERSID": b"(Pan id\n(X\1\0\0\0aK\1tQt.",
    "PROTO": b"\x80\5N.",
    "FRAME": b"\x80\4\x95\2\0\0\0\0\0\0\0N.",
    "EXT": b"(\x82\xf0\x83\xf1\xf0\x84\xf1\xf0\xf0\0t.",
    "SUBCLASSES": b"(ccollections\nOrderedDict\n)RK\1K\2sccollections\ndeque\n)R(K\1K\2ecbuiltins\nset\n)R(K\1\x90t.",
    "TRAILING": b"N. and more",
}  # fmt: skip

KNOWN_ESCAPES_ONLY = pytest.mark.filterwarnings("ignore:invalid escape sequence")
"""CPython warns of an escape that it does not know, and then takes it as it stands."""


@KNOWN_ESCAPES_ONLY
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "EXT"])
def test_each_opcode_means_what_cpython_takes_it_for(name: str) -> None:
    assert same(read(EXAMPLES[name]), loaded(EXAMPLES[name]))


def test_extension_codes_are_read() -> None:
    root = read_pickle(EXAMPLES["EXT"]).root
    assert isinstance(root, tuple)
    assert [node.code for node in root if isinstance(node, Extension)] == [0xF0, 0xF0F1, 0xF0F0F1]


@KNOWN_ESCAPES_ONLY
def test_every_opcode_of_pickletools_has_an_example() -> None:
    used = {opcode.name for data in EXAMPLES.values() for opcode, _, _ in pickletools.genops(data)}
    assert used == {opcode.name for opcode in pickletools.opcodes}


def test_bytes_that_are_no_opcode_are_refused() -> None:
    known = {ord(opcode.code) for opcode in pickletools.opcodes}
    for code in set(range(256)) - known:
        with pytest.raises(MalformedError, match="has an opcode that does not exist"):
            read_pickle(b"N" + bytes((code,)) + b".")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_pickle_cut_short_anywhere_is_refused(name: str) -> None:
    data = EXAMPLES[name].removesuffix(b" and more")
    for length in range(len(data)):
        with pytest.raises((TruncatedError, MalformedError)):
            read_pickle(data[:length])


@KNOWN_ESCAPES_ONLY
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_mapped_pickle_and_one_within_a_file_read_the_same(name: str) -> None:
    data = EXAMPLES[name]
    graph = read_pickle(data)
    assert graph.nbytes == data.index(b".", pickletools_end(data) - 1) + 1
    shifted = read_pickle(memoryview(b"junk" + data), offset=4)
    assert (shifted.nbytes, shifted.protocol) == (graph.nbytes, graph.protocol)
    assert [node.qualified for node in shifted.globals] == [node.qualified for node in graph.globals]


def pickletools_end(data: bytes) -> int:
    """The length of a pickle up to and including STOP, as pickletools counts it."""
    return max(position for _, _, position in pickletools.genops(data) if position is not None) + 1


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 2100), 1 << 2100)
    | st.floats()
    | st.text()
    | st.text(st.characters(), max_size=3)
    | st.binary()
    | st.binary().map(bytearray)
    | st.frozensets(st.integers() | st.text())
    | st.sets(st.tuples(st.integers(), st.text())),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()) | st.none(), inner)
        | st.lists(inner, max_size=3).map(lambda items: [items, items])
    ),
    max_leaves=30,
)


@settings(max_examples=most(120), deadline=None)
@given(PLAIN, st.sampled_from(PROTOCOLS), st.booleans())
@example("😀" * 70_000, 4, True)
@example(b"\xff" * 70_000, 4, True)
@example(bytearray(b"\xff" * 70_000), 5, True)
@example("é" * 300, 0, False)
@example(list(range(3000)), 2, True)
def test_plain_data_reads_as_it_was_written(data: Any, protocol: int, in_c: bool) -> None:
    written = (pickle.dumps if in_c else pickle._dumps)(data, protocol)  # type: ignore[attr-defined]
    graph = read_pickle(written)
    assert graph.nbytes == len(written)
    assert graph.protocol == (protocol if protocol >= 2 else 0)
    assert same(Maker(written, encoding="latin-1").make(graph.root), data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_of_many_kinds_read_as_they_were_written(protocol: int) -> None:
    slotted = Slotted()
    slotted.a = 1
    shared = [1, 2]
    objects = [Point(1, 2), Fraction(1, 3), collections.OrderedDict(a=1), collections.deque([1, 2]), Point,
               collections.defaultdict(list, a=[1]), collections.Counter("hello"), shared, shared, range(3), 1 + 2j,
               *([slotted, Keyword(n=1)] if protocol >= 2 else [])]  # fmt: skip
    made = read(pickle.dumps(objects, protocol))
    assert same(made, objects)
    assert made[7] is made[8]


def test_a_list_and_a_dict_that_hold_themselves_are_read() -> None:
    root: list[Any] = []
    root.append({"root": root})
    for protocol in PROTOCOLS:
        made = read(pickle.dumps(root, protocol))
        assert made[0]["root"] is made


PIECES = [b"(", b")", b"]", b"}", b"\x8f", b"N", b"K\1", b"X\1\0\0\0a", b"q\0", b"h\0", b"q\1", b"h\1", b"r\2\0\0\0",
          b"j\2\0\0\0", b"p3\n", b"g3\n", b"l", b"t", b"d", b"e", b"s", b"u", b"a", b"0", b"1", b"2", b"\x85", b"\x86",
          b"\x87", b"\x90", b"\x91", b"\x94", b"C\1a", b"F1\n", b"I1\n", b"\x80\4", b"cfractions\nFraction\n", b"R",
          b"\x97", b"\x98", b"Q", b"b"]  # fmt: skip


@settings(max_examples=most(400), deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25))
@example([b"N", b"(", b"\x85", b"t"])
@example([b"(", b"N", b"0", b"0", b"N"])
def test_whatever_cpython_loads_is_read_as_the_same(pieces: list[bytes]) -> None:
    data = b"".join(pieces) + b"."
    try:
        expected = loaded(data)
    except Exception:
        _refusal(data)
        return
    refusal = _refusal(data)
    if refusal is None:
        assert same(read(data), expected)
    else:
        assert any(
            words in refusal for words in ("values behind", "in the middle of a value", "both counts and", "OutOfBand")
        )


@settings(max_examples=most(300), deadline=None)
@given(st.sampled_from(sorted(EXAMPLES)), st.data())
def test_a_damaged_pickle_is_read_or_refused(name: str, data: st.DataObject) -> None:
    raw = bytearray(EXAMPLES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    _refusal(bytes(raw))


@settings(max_examples=most(300), deadline=None)
@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    _refusal(data)


def _refusal(data: bytes) -> str | None:
    """What is said of a pickle that is refused, in one line; None for one that is read."""
    try:
        read_pickle(data)
    except CkptError as error:
        refusal = str(error)
    else:
        return None
    assert "\n" not in refusal
    return refusal


@settings(max_examples=most(300), deadline=None)
@given(st.text("\\x01289abfntrv'\"q\n é", max_size=12).map(lambda text: text.encode("latin-1")))
def test_python_2_strings_unescape_as_cpython_unescapes_them(text: bytes) -> None:
    line = b"S'" + text.replace(b"\n", b"") + b"'\n."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = codecs.escape_decode(text.replace(b"\n", b""))[0]
        except ValueError:
            with pytest.raises(MalformedError):
                read_pickle(line)
            return
    root = read_pickle(line).root
    assert isinstance(root, RawString)
    assert root.raw == expected
