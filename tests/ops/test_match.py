"""`match` against torch: the verdict of `load_state_dict(strict=True)`, and renamings that make it work."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from state_pairs import Pair, load, pair

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.match import Match, match
from ckpt_cli.ops.match_cures import Search
from ckpt_cli.ops.match_states import Leaf, State, state_of

SEEDS = range(200)


def matched(folder: Path, made: Pair, *, whole: bool = False) -> Match:
    torch.save(made.state, folder / "a.pt")
    torch.save(made.model if whole else made.model.state_dict(), folder / "b.pt")
    with closing(open_checkpoint(str(folder / "a.pt"))) as a, closing(open_checkpoint(str(folder / "b.pt"))) as b:
        return match(state_of(a, ""), state_of(b))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_verdict_is_that_of_torch(tmp_path: Path, seed: int) -> None:
    made = pair(seed)
    names = made.model.state_dict()
    only_dict = any(name.endswith("_extra_state") or "parametrizations" in name for name in names)
    found = matched(
        tmp_path, made, whole=seed % 3 == 0 and not only_dict
    )  # others cannot be pickled whole, or do not say
    loaded = load(made.model, torch.load(tmp_path / "a.pt", weights_only=False))
    verdict = found.verdict
    assert (verdict.loads, set(verdict.missing), set(verdict.unexpected)) == (
        loaded.loads, loaded.missing, loaded.unexpected,
    ), made.did  # fmt: skip
    assert {size.name for size in verdict.sizes} == loaded.sizes


def _is_right(made: Pair, found: Match) -> bool:
    wanted = set(made.model.state_dict())
    truth = {old: new for old, new in made.truth.items() if new in wanted}
    cure = {old: new for old, new in found.cures[0].names.items() if new in wanted} if found.cures else {}
    return cure == truth


def test_of_the_pairs_that_a_renaming_mends_the_right_one_comes_first(tmp_path: Path) -> None:
    mended, wrong = 0, []
    for seed in SEEDS:
        made, same = pair(seed), pair(seed)
        if load(same.model, same.state).loads or not made.truth:
            continue
        mended += 1
        found = matched(tmp_path, made)
        if not _is_right(made, found):
            wrong.append((seed, type(made.model).__name__, made.did, [c.rules for c in found.cures]))
    assert mended > 100
    assert len(wrong) <= mended // 20, "\n".join(map(str, wrong))


def leaves(names: list[str], shapes: list[tuple[int, ...]]) -> State:
    return State("x.pt", "", {n: Leaf(n, shape, "float32") for n, shape in zip(names, shapes, strict=True)})


@pytest.mark.parametrize("prefix", ["module.", "language_model.transformer.h."])
def test_ten_thousand_names_take_a_bounded_number_of_steps(prefix: str) -> None:
    kinds = ["attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight", "mlp.up.weight", "mlp.down.weight",
             "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]  # fmt: skip
    names = [f"layers.{layer}.{kind}" for layer in range(1000) for kind in kinds]
    shapes = [(4, 4) if ".attn" in name else (8, 4) if ".up" in name else (4,) for name in names]
    search = Search(leaves([prefix + name for name in names], shapes), leaves(names, shapes))
    (cure,) = search.cures()
    assert (cure.mends, cure.guess) == (10_000, False)
    assert search.steps <= 30 * len(names)


def test_names_that_have_nothing_in_common_take_a_bounded_number_of_steps() -> None:
    shapes = [(number % 7, number % 11) for number in range(10_000)]
    one, other = ([f"{side}{n * n % 9973}.{side}{n}" for n in range(10_000)] for side in "ab")
    search = Search(leaves(one, shapes), leaves(other, shapes[::-1]))
    assert all(cure.guess for cure in search.cures())
    assert search.steps <= 70 * len(one)


def test_layers_counted_from_another_number_are_a_guess_as_others_would_fit_too() -> None:
    one, other = ([f"layers.{n}.weight" for n in range(begin, begin + 4)] for begin in (1, 0))
    first, *_ = Search(leaves(one, [(2, 2)] * 4), leaves(other, [(2, 2)] * 4)).cures()
    assert dict(first.names) == dict(zip(one, other, strict=True))
    assert first.guess
