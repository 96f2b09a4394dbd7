"""`match` against torch: the verdict of `load_state_dict(strict=True)`, and renamings that make it work."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path

import pytest
import torch
from state_pairs import Pair, load, pair

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.match import Match, match
from ckpt_cli.ops.match_states import state_of

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
    found = matched(tmp_path, made, whole=seed % 3 == 0 and not only_dict)  # others cannot be pickled whole, or do not say
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
        made = pair(seed)
        state = made.state.copy()
        model = copy.deepcopy(made.model)
        if load(copy.deepcopy(model), state).loads or not made.truth:
            continue
        mended += 1
        found = matched(tmp_path, made)
        if not _is_right(made, found):
            wrong.append((seed, type(model).__name__, made.did, [c.rules for c in found.cures]))
    assert mended > 100
    assert len(wrong) <= mended // 20, "\n".join(map(str, wrong))
