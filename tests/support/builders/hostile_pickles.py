"""Pickles made to harm whoever reads them: by running, by hashing, by recursion, and by promising too much."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

from builders.pickles import (
    Ops,
    built,
    call,
    named,
    new,
    ordered_dict,
    parameter,
    persistent,
    pickled,
    storage,
    tensor,
    value,
)

Case = tuple[str, Callable[[], bytes], str | None]

SCALE = float(os.environ.get("HOSTILE_SCALE", "0.25"))
"""By what the size of these pickles and of those of hostile_walks.py is multiplied, and the limits that they meet."""

MILLION = int(1_000_000 * SCALE)
SOUND = tensor("0", (4,))
"""A tensor as it should be: the storage that stands by has 64 bytes."""

_TOUCH = "touch canary"

# --- what runs when it is unpickled: each may open, and must not run -------------------------------------------------

_RUNNING: list[tuple[str, Ops]] = [
    ("os_system", call("os.system", _TOUCH)),
    ("posix_system", call("posix.system", _TOUCH)),
    ("builtins_open", call("builtins.open", "canary", "w")),
    ("builtins_eval", call("builtins.eval", "open('canary', 'w')")),
    ("builtins_exec_as_a_key", value({call("builtins.exec", "open('canary', 'w')"): 1})),
    ("pathlib_touch", call("pathlib.Path.touch", call("pathlib.Path", "canary"))),
    ("newobj", new("builtins.open", "canary", "w")),
    ("newobj_ex", Ops(named("builtins.open") + value(("canary",)) + value({"mode": "w"}) + b"\x92")),
    ("inst", Ops(b"(" + value(_TOUCH) + b"ios\nsystem\n")),
    ("obj", Ops(b"(" + named("os.system") + value(_TOUCH) + b"o")),
    ("build_with_setstate", built(new("ctypes.CDLL"), {"__setstate__": named("os.system"), "name": _TOUCH})),
    ("stack_global", Ops(value("os") + value("system") + b"\x93" + value((_TOUCH,)) + b"R")),
    ("nested_getattr", call("builtins.getattr", call("builtins.__import__", "os"), "system")),
    ("runpy", call("runpy._run_code", "open('canary', 'w')", {})),
    ("a_reduced_metadata", ordered_dict([("a", SOUND)], {"_metadata": call("os.system", _TOUCH)})),
]

# --- depth and breadth: what recursion, hashing and copying would not survive ----------------------------------------


def deep(levels: int = 200_000) -> Ops:
    """A tuple within a tuple within a tuple…"""
    return Ops(b")" + b"\x85" * levels)


def doubled(times: int = 26) -> Ops:
    """A tuple that is reached in 2 ** times ways: 56 bytes that take minutes to hash."""
    return Ops(b")" + b"2\x86" * times)


def nested(wrap: Callable[[Ops], Ops], inner: Ops, levels: int) -> Ops:
    """One thing within another, many times."""
    marker = Ops(b"\0inner\0")
    before, after = wrap(marker).split(marker)
    return Ops(before * levels + inner + after * levels)


def _shape(size: Any, stride: Any = (1,), offset: Any = 0) -> Ops:
    view = (storage("0", 16), offset, size, stride)
    return value({"a": call("torch._utils._rebuild_tensor_v2", *view, False, ordered_dict())})


_SHAPED: list[tuple[str, Ops, str | None]] = [
    ("a_deep_tuple", value({"a": deep(MILLION)}), "nest deeper"),
    ("a_deep_tuple_as_root", deep(), "nest deeper"),
    ("a_deep_tuple_as_key", value({deep(MILLION): 1}), None),
    ("a_deep_tuple_in_a_set", Ops(b"\x8f(" + deep() + b"\x90"), None),
    ("a_deep_tuple_as_state", built(new("a.B"), deep()), None),
    ("a_deep_tuple_as_shape", _shape(deep()), "its shape or stride holds"),
    ("a_deep_tuple_as_offset", _shape((4,), offset=deep()), "its offset is"),
    ("a_deep_tuple_as_storage", value({"a": persistent(deep())}), None),
    ("a_deep_tuple_as_key_of_a_storage", value({"a": Ops(SOUND.replace(value("0"), deep()))}), "in a way that"),
    ("a_deep_tuple_as_name", Ops(value("os") + deep() + b"\x93"), "names a global by a tuple"),
    ("a_deep_list", Ops(b"]" * MILLION + b"a" * (MILLION - 1)), "nest deeper"),
    ("a_deep_dict", nested(lambda inner: value({"a": inner}), value(1), MILLION // 10), "nest deeper"),
    ("a_deep_object", nested(lambda inner: built(new("a.B"), {"x": inner}), value(1), MILLION // 10), "nest deeper"),
    ("a_deep_call", nested(lambda inner: call("a.b", inner), value(1), MILLION // 10), None),
    ("a_deep_function", Ops(named("a.b") + b")R" * MILLION), None),
    ("deep_persistent_ids", Ops(value(0) + b"Q" * MILLION), None),
    ("deep_parameters", nested(parameter, SOUND, MILLION // 10), "made of tensors"),
    ("a_doubled_tuple", value({"a": doubled()}), "opens up to more than"),
    ("a_doubled_tuple_as_key", value({doubled(): 1}), None),
    ("a_doubled_tuple_in_a_set", Ops(b"\x8f(" + doubled() + b"\x90"), None),
    ("a_doubled_tuple_as_shape", _shape(doubled()), "its shape or stride holds"),
    ("a_doubled_tuple_as_argument", call("a.b", doubled(40)), None),
    ("a_shape_that_overflows", _shape((2**40, 2**40, 2**40), (1, 1, 1)), "more elements than 64 bits can count"),
    ("a_size_beyond_64_bits", _shape((2**63,)), "its shape or stride holds 9223372036854775808"),
    ("a_size_of_a_million_bits", _shape((1 << MILLION // 8,)), "its shape or stride holds <integer of"),
    ("a_negative_size", _shape((-4,)), "its shape or stride holds -4"),
    ("a_negative_stride", _shape((4,), (-1,)), "its shape or stride holds -1"),
    ("a_call_as_offset", _shape((4,), offset=call("os.system", _TOUCH)), "its offset is os.system('touch canary')"),
    ("a_negative_offset", _shape((4,), offset=-1), "its offset is -1"),
    ("an_offset_beyond_the_storage", _shape((4,), offset=13), "needs bytes 52–68, storage '0' has 64"),
    ("a_stride_beyond_the_storage", _shape((4,), (6,)), "needs bytes 0–76, storage '0' has 64"),
    ("an_expanded_exabyte", _shape((2**62,), (0,)), None),
    ("a_bool_as_size", _shape((True,)), "its shape or stride holds True"),
    ("sixty_five_dimensions", _shape((1,) * 65, (1,) * 65), "not a tuple of integers"),
    ("a_storage_longer_than_its_record", value({"a": tensor("0", (17,))}), "should have 68 bytes, its record has 64"),
    ("a_storage_of_2**62_elements", value({"a": tensor("0", (4,), numel=2**62)}), "its record has 64"),
    ("a_storage_of_negative_length", value({"a": tensor("0", (4,), numel=-4)}), "in a way that torch does not write"),
    ("a_storage_that_is_not_there", value({"a": tensor("9", (4,))}), "storage '9' has no record"),
    ("a_storage_key_that_climbs", value({"a": tensor("../version", (0,))}), "has no record"),
    ("a_storage_of_two_dtypes", value([SOUND, tensor("0", (4,), "Long")]), "is float32 in one place and int64"),
    ("escapes_in_names", value({"\x1b[2J\n\r\0‮a": SOUND, "\ud800": 1}), None),
    ("escapes_in_globals", call("os\x1b[2J.\rsystem", 1), None),
    ("an_integer_of_500_000_bits", value({"a": Ops(b"\x8b" + struct.pack("<i", 62_500) + b"\x7f" * 62_500)}), None),
]

# --- promises: lengths, counts and memo slots far beyond the data ----------------------------------------------------


def _u64(code: bytes, number: int) -> bytes:
    return code + struct.pack("<Q", number)


_PROMISES: list[tuple[str, bytes, str]] = [
    ("binput_2**27", b"Nr" + struct.pack("<I", 2**27) + b"0N.", ""),
    ("put_of_2**70", b"Np%d\n." % 2**70, ""),
    ("put_of_minus_one", b"Np-1\n.", "puts into memo -1"),
    ("get_of_nothing", b"h\7.", "asks for memo 7, which it never put"),
    ("get_of_minus_one", b"Nq\0g-1\n.", "asks for memo -1, which it never put"),
    ("bytes_of_2**63", _u64(b"\x8e", 2**63) + b".", "ends within a string of 9223372036854775808 bytes"),
    ("text_of_2**64", _u64(b"\x8d", 2**64 - 1) + b".", "ends within a string"),
    ("bytearray_of_2**40", _u64(b"\x96", 2**40) + b".", "ends within a string of 1099511627776 bytes"),
    ("text_of_4_gb", b"X\xff\xff\xff\xff.", "ends within a string of 4294967295 bytes"),
    ("string_of_minus_one", b"T\xff\xff\xff\xff.", "ends within a string of -1 bytes"),
    ("frame_of_2**63", _u64(b"\x80\4\x95", 2**63) + b"N.", "ends within a frame of 9223372036854775808 bytes"),
    ("integer_of_2_gb", b"\x8b\xff\xff\xff\x7f.", "has an integer of 2147483647 bytes"),
    ("integer_of_minus_one", b"\x8b\xff\xff\xff\xff.", "ends within an argument of -1 bytes"),
    ("integer_of_60_000_digits", b"L" + b"9" * 60_000 + b"L\n.", "has a bad argument"),
    ("line_of_a_megabyte", b"I" + b"1" * 1_000_000 + b"\n.", "has a line of over 65536 bytes"),
    ("line_without_end", b"cos", "ends within a line"),
    ("no_stop", b"\x80\2N", "ends before its STOP"),
    ("nothing", b"", "ends before its STOP"),
    ("only_stop", b".", "stops in the middle of a value"),
    ("an_open_mark", b"(N.", "stops in the middle of a value"),
    ("no_mark", b"Nt.", "has no mark for an opcode that needs one"),
    ("an_empty_stack", b"\x85.", "finds too little on its stack"),
    ("a_value_below_the_mark", b"N(\x85t.", "finds too little on its stack"),
    ("values_left_behind", b"NN.", "leaves 1 values behind"),
    ("protocol_255", b"\x80\xffN.", "says protocol 255"),
    ("an_unknown_opcode", b"\xffN.", "has an opcode that does not exist"),
    ("items_of_an_integer", b"K\1(NNu.", "sets items of a int"),
    ("state_of_a_list", b"]]b.", "gives state to a list"),
    ("a_key_without_value", b"(Nd.", "has a key without a value"),
    ("bytes_that_are_no_text", b"X\2\0\0\0\xff\xfe.", "has a bad argument"),
    ("a_persistent_id_alone", value({"a": persistent("x")}) + b".", ""),
]

# --- floods: little in the file, much in memory or much to do --------------------------------------------------------

_MANY = 9 * MILLION
_LINES = int(900 * SCALE)
_OPCODES = f"has more than {int(8_000_000 * SCALE)} opcodes"

_FLOODS: list[tuple[str, Callable[[], bytes], str | None]] = [
    ("nine_million_nones", lambda: b"(" + b"N" * _MANY + b"l.", _OPCODES),
    ("nine_million_pops", lambda: b"N" + b"20" * (_MANY // 2) + b".", _OPCODES),
    ("nine_million_lists", lambda: b"(" + b"]" * _MANY + b"l.", "builds far more objects"),
    ("nine_million_marks", lambda: b"(" * _MANY + b".", "builds far more objects"),
    ("three_million_calls", lambda: b"ca\nb\nq\0000(" + b"h\0)R" * 3 * MILLION + b"l.", "builds far more objects"),
    ("nearly_two_million_calls", lambda: b"ca\nb\nq\0000(" + b"h\0)R" * (9 * MILLION // 5) + b"l.",
     "its names take far more memory"),
    ("nine_million_puts", lambda: b"N" + b"q\0" * _MANY + b".", _OPCODES),
    ("puts_out_of_order", lambda: b"N" + b"".join(b"r" + struct.pack("<I", 2 * n) for n in range(MILLION)) + b".",
     f"puts {int(262_144 * SCALE)} things into its memo out of order"),
    ("a_million_globals", lambda: b"ca\nb\n0" * MILLION + b"N.", f"has more than {int(500_000 * SCALE)} lines"),
    ("a_million_names_to_import", lambda: b"(" + b"".join(b"ca\n%d\n" % n for n in range(MILLION)) + b"l.",
     f"has more than {int(500_000 * SCALE)} lines"),
    ("strings_with_escapes", lambda: b"S'\\d'\n0" * MILLION + b"N.", f"has more than {int(500_000 * SCALE)} lines"),
    ("long_wide_text", lambda: b"(" + value("a" * 60_000 + "😀") * _LINES + b"l.", "bytes of text"),
    ("short_wide_text", lambda: b"(" + value("a" * 250 + "😀") * (MILLION // 5) + b"l.", "bytes of text"),
    ("long_lines", lambda: b"(" + (b"V" + b"a" * 60_000 + b"\\U0001f600\n") * _LINES + b"l.", "bytes of text"),
    ("long_globals", lambda: b"(" + b"".join(b"c%06d%s\nb\n" % (n, b"\xff" * 60_000) for n in range(_LINES)) + b"l.",
     "bytes of text"),
]  # fmt: skip

PICKLES: list[Case] = [
    *((f"runs_{name}", lambda ops=ops: pickled({"a": ops, "b": SOUND}), None) for name, ops in _RUNNING),
    *((name, lambda ops=ops: pickled(ops), refused) for name, ops, refused in _SHAPED),
    *((name, lambda raw=raw: raw, refused or None) for name, raw, refused in _PROMISES),
    *_FLOODS,
]
"""Name, pickle, and a part of the error or None where it may open."""
