"""Many assignments in one command, over views that overlap, with torch as the oracle."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import torch
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from set_elements import edit, edited_by_torch, same_states

from ckpt_cli.ops.show import spell_index


def state() -> dict[str, torch.Tensor]:
    """Views of one storage that are tied, transposed, overlapping, and one of another storage."""
    flat = torch.arange(1.0, 31.0)
    return {
        "a": flat[:20].reshape(4, 5),
        "tied": flat[:20].reshape(4, 5),
        "t": flat[:20].reshape(4, 5).t(),
        "late": flat[12:],
        "other": torch.ones(3, 2, dtype=torch.float64),
    }


@st.composite
def assignments(draw: st.DrawFn) -> tuple[str, object, str, int]:
    """A name, an index that it takes, an operator and a number."""
    name = draw(st.sampled_from(list(state())))
    index = draw(basic_indices(tuple(state()[name].shape), allow_newaxis=False))
    return name, index, draw(st.sampled_from(["", "+", "-", "*"])), draw(st.integers(-3, 3))


@settings(max_examples=most(200), deadline=None)
@given(st.lists(assignments(), min_size=1, max_size=6))
def test_a_sequence_of_assignments_does_what_torch_does_one_by_one(
    drawn: list[tuple[str, object, str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        torch.save(state(), path)
        oracle = torch.load(path)
        texts = []
        for name, index, operator, number in drawn:
            spelled = spell_index(index if isinstance(index, tuple) else (index,)) or "..."
            texts.append(f"{name}[{spelled}]{operator}={number}")
            edited_by_torch(oracle[name], index, operator, number)
        done = edit(path, *texts)
        after = torch.load(path)
        assert same_states(after, oracle)
        assert not {*done.changed} & {*done.also_changed}
        for name, tensor in state().items():
            if not torch.equal(tensor, after[name]):
                assert name in (*done.changed, *done.also_changed)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
