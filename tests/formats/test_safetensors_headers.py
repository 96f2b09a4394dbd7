"""Any header of a safetensors file gets the verdict of the reference library."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import st as files
from builders.st import floats
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors_oracle import agree

NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 16, 24, 2**32, 2**63, 2**64 - 1, 2**64, -1, 1.0, True, None, "4", "-0"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from(["F32", "I64", "U8", "BOOL", "F4", "F6_E2M3", "f32", "", None, 1, ["F32"]]),
    "shape": st.lists(NUMBERS, max_size=4) | st.sampled_from([None, "", 4, {}]),
    "data_offsets": st.lists(NUMBERS, max_size=3) | st.sampled_from([None, "", 4]),
    "extra": st.recursive(st.none() | st.integers() | st.text(max_size=2), lambda inner: st.lists(inner, max_size=2)),
}


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A sound file, a few things of which were changed."""
    header, data = floats(*draw(st.lists(st.integers(0, 4), max_size=4)))
    header = {name: header[name] for name in draw(st.permutations(sorted(header)))}
    for _ in range(draw(st.integers(0, 3))):
        if header:
            target = header[draw(st.sampled_from(sorted(header)))]
            field = draw(st.sampled_from(sorted(FIELDS)))
            if draw(st.booleans()):
                target.pop(field, None)
            else:
                target[field] = draw(FIELDS[field])
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.none()))
    raw = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass").replace(b'"-0"', b"-0")
    padding = draw(st.sampled_from([b"", b" ", b"\n", b"\0"]))
    more = draw(st.integers(-1, 1))
    return files.file(raw + padding, data[:more] if more < 0 else data + bytes(more))


@settings(max_examples=500, deadline=None)
@given(headers())
def test_any_header_gets_the_reference_s_verdict(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    agree(tmp_path_factory.getbasetemp(), content)
