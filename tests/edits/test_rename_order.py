"""Renaming options: carried out in the order given, as often as given, and offered where names lie in containers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_edit import assert_refused, edited, edited_as_told


def saved(path: Path, *names: str) -> Path:
    torch.save({name: torch.full((1,), number) for number, name in enumerate(names)}, path)
    return path


def names_in(path: Path) -> dict[str, int]:
    """The names of a flat file, each with the number that tells where it was."""
    return {name: int(tensor) for name, tensor in torch.load(path, weights_only=True).items()}


def test_every_option_is_carried_out_in_the_order_given(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", "a.x.b.w", "a.x.b.v")
    (tmp_path / "map.json").write_text(json.dumps({"new.w": "new.v", "new.v": "new.w"}))
    rules = ["--strip", "a.", "--sub", "x", "y", "--strip", "y", "--sub", "^b", "c", "--add", "p", "--add", "q"]
    edited_as_told(ckpt, "rename", path, *rules)
    assert names_in(path) == {"q.p.c.w": 0, "q.p.c.v": 1}
    edited(ckpt, "rename", path, "q.p.c", "old", "--sub=old", "new", "--map", tmp_path / "map.json")
    assert names_in(path) == {"new.v": 0, "new.w": 1}
    edited(ckpt, "rename", path, "--map", tmp_path / "map.json", "--sub", "w$", "x", "--sub", "v$", "w")
    assert names_in(path) == {"new.x": 0, "new.w": 1}


PREFIXES = st.sampled_from("abc")
EXPRESSIONS = st.sampled_from(["a", "^b", r"\.c", "[ab]", "(a)(.)"])
REPLACEMENTS = st.sampled_from(["b", "c", "a.a", r"x\g<0>"])
MAPS = st.dictionaries(
    st.sampled_from(["a", "b", "a.b", "c.a", "b.c"]), st.sampled_from(["a", "b", "c.c"]), min_size=1, max_size=3
)
RULES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["--strip", "--add"]), PREFIXES),
        st.tuples(st.just("--sub"), EXPRESSIONS, REPLACEMENTS),
        st.tuples(st.just("--map"), MAPS),
    ),
    min_size=2,
    max_size=4,
)


@pytest.mark.parametrize("is_nested", [False, True], ids=["flat", "nested"])
@given(rules=RULES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rules_of_one_call_do_what_as_many_calls_do(
    tmp_path: Path, ckpt: Ckpt, is_nested: bool, rules: list[tuple[Any, ...]]
) -> None:
    names = ("a.b.w", "a.c.w", "b.a.w", "c.b")
    one = saved(tmp_path / "one.pt", *names)
    if is_nested:
        torch.save({"state": torch.load(one, weights_only=True), "epoch": torch.tensor(9)}, one)
    many = tmp_path / "many.pt"
    shutil.copyfile(one, many)
    words: list[list[str]] = []
    for number, (option, *values) in enumerate(rules):
        if option == "--map":
            file = tmp_path / f"{number}.json"
            file.write_text(json.dumps(values[0]))
            values = [str(file)]
        words.append([option, *values])
    answers = []
    for rule in words:
        answers.append(ckpt("rename", many, *rule).code)
        if answers[-1]:
            break
    together = ckpt("rename", one, *(word for rule in words for word in rule))
    assert together.code in (0, 2)
    if not any(answers):  # what passes step by step passes at once, where nothing collides on the way
        assert together.code == 0, (words, together)
        assert names_of(one) == names_of(many)


def test_containers_are_renamed_level_by_level_where_one_level_could_be_read_in_two_ways(
    tmp_path: Path, ckpt: Ckpt
) -> None:
    """`state.a.w` could become `stxa.ate.xa.a.w` by a new key of `state` alone, which `state.b` could not have."""
    one = tmp_path / "one.pt"
    torch.save({"state": {"a": {"w": torch.tensor(0)}, "b": {"a": {"w": torch.tensor(1)}}}}, one)
    edited(ckpt, "rename", one, "--sub", "a", r"x\g<0>", "--sub", "a", "a.a")
    assert names_of(one) == {"stxa.ate.xa.a.w": 0, "stxa.ate.b.xa.a.w": 1}


def names_of(path: Path) -> dict[str, int]:
    """The dotted names of a file of dicts."""
    found: dict[str, int] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            found[prefix] = int(value)

    walk("", torch.load(path, weights_only=True))
    return found


def test_names_may_collide_on_the_way_but_not_at_the_end(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", "a", "b")
    edited(ckpt, "rename", path, "--sub", "^a$", "b.x", "--sub", "^b$", "a", "--sub", r"^b\.x$", "b")
    assert names_in(path) == {"b": 0, "a": 1}
    assert_refused(ckpt, path, "would both be called 'b'", "rename", "--sub", "a", "c", "--sub", "c", "b")
    assert_refused(ckpt, path, "no name would change by '--sub z'", "rename", "--sub", "a", "c", "--sub", "z", "b")


def test_diff_aligns_names_by_every_option_in_the_order_given(tmp_path: Path, ckpt: Ckpt) -> None:
    a = saved(tmp_path / "a.pt", "module.net.l.weight_g", "module.net.l.weight_v")
    b = saved(tmp_path / "b.pt", "l.p0", "l.p1")
    rules = ["--strip", "module", "--strip", "net", "--sub", "weight_g$", "p0", "--sub", "weight_v$", "p1"]
    assert ckpt("diff", a, b, *rules).code == 0
    assert ckpt("diff", a, b, *rules[2:]).code == 1
    assert ckpt("diff", a, b, *rules[2:4], *rules[:2], *rules[4:]).code == 1


@pytest.mark.parametrize(
    "words",
    [
        ["keep", "m.pt", "--root", "a", "--root", "b"],
        ["convert", "m.pt", "o.pt", "--dtype", "half", "--dtype", "float32"],
        ["rename", "m.pt", "a", "b", "-o", "x.pt", "--output", "y.pt"],
        ["ls", "m.pt", "--sort", "name", "--sort", "size"],
    ],
    ids=lambda words: words[0],
)
def test_an_option_that_takes_one_value_is_not_given_twice(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "m.pt", "a", "b")
    answer = ckpt(*words)
    assert answer.code == 2
    assert re.fullmatch(r"ckpt: --\w+ is given 2 times, and takes one value\n", answer.err)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "m.pt"]


# --- names inside containers -----------------------------------------------------------------------------------------


def w() -> torch.Tensor:
    return torch.ones(1)


LIGHTNING = {"epoch": 1, "state_dict": {"model.a.w": w(), "model.b": w()}, "ema": {"module.x": w(), "module.y": w()}}
TWICE = {"state_dict": {"model.a": w()}, "swa": {"model.a": w()}, "step": 3}
NESTED = {"epoch": 1, "ema": {"module": {"x": w()}}}

OFFERS = [
    (LIGHTNING, ["--strip", "model."], "behind 'state_dict.' (2)", ["state_dict.a.w", "state_dict.b"]),
    (LIGHTNING, ["--strip", "module"], "behind 'ema.' (2)", ["ema.x", "ema.y"]),
    (LIGHTNING, ["model", "net"], "did you mean state_dict.model?", ["state_dict.net.a.w", "state_dict.net.b"]),
    (LIGHTNING, ["x", "z"], "nothing is called 'x'", ["ema.module.z"]),
    (TWICE, ["--strip", "model"], "behind 'state_dict.' (1), behind 'swa.' (1)", ["state_dict.a", "swa.a"]),
    (NESTED, ["--strip", "module"], "behind 'ema.' (1)", None),
]  # fmt: skip


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("number", range(len(OFFERS)))
def test_the_command_that_is_offered_does_it(tmp_path: Path, ckpt: Ckpt, number: int, is_zip: bool) -> None:
    value, words, told, wanted = OFFERS[number]
    path = tmp_path / "a checkpoint.pt"
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    assert_refused(ckpt, path, told, "rename", *words)
    hint = ckpt("rename", path, *words).err.splitlines()[-1]
    offered = shlex.split(hint[hint.index("ckpt ") :])[1:]
    if wanted is None:  # names of dicts in dicts cannot move up: the inner one can be written by itself
        out = tmp_path / "out.pt"
        assert ckpt(*(str(out) if word == "OUT" else word for word in offered)).code == 0
        assert list(names_of(out)) == ["x"]
        return
    assert ckpt(*offered).code == 0
    assert set(wanted) <= set(names_of(path))


def test_what_is_offered_in_place_of_one_of_several_options_does_it(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save(LIGHTNING, path)
    answer = ckpt("rename", path, "--sub", "^ema", "ema2", "--strip", "model")
    offered = shlex.split(answer.err.splitlines()[-1].partition("in its place: ")[2])
    edited(ckpt, "rename", path, "--sub", "^ema", "ema2", *offered)
    assert {"state_dict.a.w", "state_dict.b", "ema2.module.x"} <= set(names_of(path))


def test_nothing_is_offered_that_would_collide(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save({"s": {"model.a": w(), "a": w()}}, path)
    answer = ckpt("rename", path, "--strip", "model")
    assert answer.code == 2
    assert "ckpt rename" not in answer.err
    assert "ckpt keep" in answer.err


def test_containers_and_what_is_in_them_are_renamed_in_one_call(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save({"state": {"a": {"w": w()}, "b.w": w()}, "epoch": 1}, path)
    edited_as_told(ckpt, "rename", path, "--sub", "^state", "net", "--sub", r"\.a\.", ".c.", "--sub", r"\.w$", ".v")
    found = torch.load(path, weights_only=True)
    assert (list(found), list(found["net"]), list(found["net"]["c"])) == (["net", "epoch"], ["c", "b.v"], ["v"])
