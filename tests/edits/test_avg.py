"""`avg`: the average of checkpoints of one model, held against torch, and what is refused or kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckpt_cli.edits.avg import average
from ckpt_cli.edits.avg_options import AvgOptions
from ckpt_cli.edits.derive import DeriveOptions
from ckpt_cli.formats import open as opening

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def summed(tensors: Sequence[torch.Tensor], weights: Sequence[float], divisor: float | None) -> torch.Tensor:
    """Sum as mergekit's `linear` does: from zero on, in float32, divided at last and rounded once."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    total = torch.zeros(tensors[0].shape, dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.addcmul_(tensor.to(wide), torch.tensor(weight, dtype=wide))
    if divisor is not None:
        total /= torch.tensor(divisor, dtype=wide)
    return total


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors are the same bit for bit."""
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and one.equal(other)


def states(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[State]:
    torch.manual_seed(seed)
    shapes = {"a.weight": (5, 7), "a.bias": (7,), "scale": (), "empty": (0, 3), "big": (600, 700)}
    return [{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} for _ in range(count)]


def saved(state: Any, name: str) -> str:
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, name)
    else:
        torch.save(state, name)
    return name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("weights", [None, (0.7, 0.3, 0.25), (2.0, -1.0, 1e-3)])
def test_it_is_the_sum_in_float32_rounded_once(
    ckpt: Ckpt, dtype: str, suffix: str, weights: tuple[float, ...] | None
) -> None:
    given_states = states(3, getattr(torch, dtype))
    files = [saved(state, f"{number}.{suffix}") for number, state in enumerate(given_states)]
    arguments = [] if weights is None else ["--weights", ",".join(map(str, weights))]
    answer = ckpt("avg", *files, *arguments, "-o", f"out.{suffix}")
    assert answer.code == 0, answer.err
    found = torch.load(f"out.{suffix}") if suffix == "pt" else load_file(f"out.{suffix}")
    used = weights or (1.0, 1.0, 1.0)
    for name, tensor in found.items():
        wanted = summed([state[name] for state in given_states], used, sum(used)).to(getattr(torch, dtype))
        if dtype == "float64":  # whose products torch rounds or not, as the processor can
            torch.testing.assert_close(tensor, wanted, rtol=1e-14, atol=1e-14)
        else:
            assert same(tensor, wanted), name


_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
_WEIGHTS = st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3)


@given(st.lists(st.tuples(_DTYPES, _WEIGHTS), min_size=2, max_size=5), st.integers(0, 2**32), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_dtypes_strides_and_numbers_of_files_give_the_same(
    files: list[tuple[torch.dtype, float]], seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    paths, tensors = [], []
    for number, (dtype, _) in enumerate(files):
        values = torch.randn(6, 10).to(dtype)
        if data.draw(st.booleans()):
            values = values.t().contiguous().t()
        if data.draw(st.booleans()):
            values = torch.randn(12, 10).to(dtype)[::2]
        tensors.append(values)
        paths.append(saved({"w": values}, f"{number}.pt"))
    weights = [weight for _, weight in files]
    options = AvgOptions(weights, is_normalized=False, output=DeriveOptions(force=True))
    average(paths, "out.pt", options)
    kinds = {dtype for dtype, _ in files}
    wide = torch.float64 if torch.float64 in kinds else torch.float32
    target = wide if len(kinds) > 1 else next(iter(kinds))
    found, wanted = torch.load("out.pt")["w"], summed(tensors, weights, None).to(target)
    if wide == torch.float64:  # whose products torch rounds or not, as the processor can
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    else:
        assert same(found, wanted)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_bits_do_not_depend_on_the_number_of_threads(ckpt: Ckpt, jobs: int) -> None:
    given_states = states(2, torch.bfloat16)
    files = [saved(state, f"{number}.pt") for number, state in enumerate(given_states)]
    assert ckpt("avg", *files, "-o", "one.pt", "-j", "1").code == 0
    assert ckpt("avg", *files, "-o", "more.pt", "-j", str(jobs)).code == 0
    one, more = torch.load("one.pt"), torch.load("more.pt")
    assert all(same(one[name], more[name]) for name in one)


def test_an_ema_is_that_of_a_loop(ckpt: Ckpt) -> None:
    given_states = states(4, torch.float64)
    files = [saved(state, f"{number}.pt") for number, state in enumerate(given_states)]
    assert ckpt("avg", *files, "--ema", "0.9", "-o", "out.pt").code == 0
    wanted = given_states[0]
    for state in given_states[1:]:
        wanted = {name: 0.9 * wanted[name] + 0.1 * state[name] for name in wanted}
    found = torch.load("out.pt")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-14, atol=1e-14)


def trained(seed: int) -> dict[str, Any]:
    """A checkpoint of a training with tied weights, a counter and an optimizer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(seed + 1):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": seed}


def test_all_but_the_model_is_that_of_the_last_file_and_ties_stay(ckpt: Ckpt) -> None:
    both = [trained(1), trained(2)]
    files = [saved(state, f"{number}.pt") for number, state in enumerate(both)]
    answer = ckpt("avg", *files, "-o", "out.pt")
    assert answer.code == 0, answer.err
    assert "counters that differ are those of 1.pt: model.1.num_batches_tracked" in answer.err
    found = torch.load("out.pt")
    assert found["epoch"] == 2
    assert str(found["optimizer"]) == str(both[1]["optimizer"])
    model = found["model"]
    assert model["0.weight"].data_ptr() == model["2.weight"].data_ptr()
    assert model["1.num_batches_tracked"] == 3
    for name in ("0.weight", "1.running_mean", "2.bias"):
        assert same(model[name], (both[0]["model"][name] + both[1]["model"][name]) / 2)
    assert ckpt("avg", *files, "-o", "first.pt", "--rest", "first").code == 0
    assert torch.load("first.pt")["epoch"] == 1


def test_the_model_alone_is_written_on_demand(ckpt: Ckpt) -> None:
    files = [saved(trained(number), f"{number}.pt") for number in (1, 2)]
    refused = ckpt("avg", *files, "-o", "out.safetensors")
    assert refused.code == 2
    assert "--rest drop" in refused.err
    assert ckpt("avg", *files, "-o", "out.safetensors", "--rest", "drop").code == 0
    assert set(load_file("out.safetensors")) >= {"0.weight", "0.bias", "1.weight", "1.num_batches_tracked", "2.bias"}


@pytest.mark.parametrize(
    "output", ["out.pt", "out.safetensors", "out/", "out.npz", "dcp/ --to dcp", "bin/ --to hf-bin"]
)
@pytest.mark.parametrize("kinds", ["pt safetensors", "shards dcp", "dcp pt", "pt shards"])
def test_formats_may_differ(ckpt: Ckpt, kinds: str, output: str) -> None:
    both = states(2, torch.float32)
    files = []
    for number, (state, kind) in enumerate(zip(both, kinds.split(), strict=True)):
        plain = saved(state, f"{number}.pt")
        options = {"pt": [], "safetensors": [f"{number}.safetensors"], "dcp": [f"{number}d", "--to", "dcp"],
                   "shards": [f"{number}s", "--max-shard", "1MB"]}[kind]  # fmt: skip
        if options:
            assert ckpt("convert", plain, *options).code == 0
        files.append(options[0] if options else plain)
    answer = ckpt("avg", *files, "-o", *output.split())
    assert answer.code == 0, answer.err
    wanted = {name: summed([state[name] for state in both], (1, 1), 2) for name in both[0]}
    assert ckpt("convert", output.split()[0], "back.pt").code == 0
    found = torch.load("back.pt")
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)


def test_a_set_keeps_its_shards_and_the_files_beside_it(ckpt: Ckpt) -> None:
    both = states(2)
    for number, state in enumerate(both):
        saved(state, f"{number}.pt")
        assert ckpt("convert", f"{number}.pt", f"{number}", "--max-shard", "1MB").code == 0
        Path(f"{number}/config.json").write_text(f'{{"number": {number}}}')
    assert ckpt("avg", "0", "1", "-o", "out").code == 0
    assert {path.name for path in Path("out").iterdir()} == {path.name for path in Path("1").iterdir()}
    assert json.loads(Path("out/config.json").read_text()) == {"number": 1}


def test_names_shapes_and_ties_that_differ_are_refused(ckpt: Ckpt) -> None:
    a, b = states(2)
    saved(a, "a.pt")
    saved({**b, "more": torch.ones(1)}, "more.pt")
    saved({**b, "big": b["big"][:5]}, "shape.pt")
    shared = {**b, "a.bias": b["big"][0, :7], "tied": b["a.weight"]}
    saved(shared, "tied.pt")
    saved({**a, "tied": a["a.weight"].clone()}, "apart.pt")
    saved({**a, "a.weight": a["a.weight"].to(torch.float8_e4m3fn)}, "low.pt")
    for files, problem in (
        (("a.pt", "more.pt"), "it lacks 1 of the 6 names of the others"),
        (("a.pt", "shape.pt"), "tensor 'big' is [600, 700], and [5, 700] in shape.pt"),
        (("apart.pt", "tied.pt"), "share their bytes"),
        (("a.pt", "low.pt"), "differs, and cannot be averaged"),
        (("a.pt", "nothing.pt"), "nothing.pt: No such file"),
        (("a.pt",), "takes two checkpoints at least"),
    ):
        answer = ckpt("avg", *files, "-o", "out.pt")
        assert (answer.code, answer.out) == (2, ""), answer
        assert problem in answer.err
        assert not Path("out.pt").exists()
    saved({**b, "tied": b["a.weight"]}, "tied.pt")
    answer = ckpt("avg", "apart.pt", "tied.pt", "-o", "out.pt")
    assert "a.weight, tied are tied in some of them only" in answer.err
    assert ckpt("avg", "apart.pt", "tied.pt", "-o", "out.pt", "--untie").code == 0
    found = torch.load("out.pt")
    assert found["tied"].data_ptr() != found["a.weight"].data_ptr()
    answer = ckpt("avg", "a.pt", "more.pt", "-o", "common.pt", "--common")
    assert "not in all of them, so left as they are: more" in answer.err
    assert torch.load("common.pt")["more"] == 1


def test_a_tensor_that_is_tied_to_what_is_not_averaged_is_not_untied_without_a_word(ckpt: Ckpt) -> None:
    for name in "ab":
        weight = torch.randn(3)
        saved({"model": {"w": weight, "b": torch.ones(1)}, "ema": {"w": weight}}, f"{name}.pt")
    answer = ckpt("avg", "a.pt", "b.pt", "-o", "out.pt")
    assert (answer.code, Path("out.pt").exists()) == (2, False)
    assert "b.pt: model.w, ema.w share their bytes" in answer.err
    assert ckpt("avg", "a.pt", "b.pt", "-o", "out.pt", "--untie").code == 0
    found, last = torch.load("out.pt"), torch.load("b.pt")
    assert same(found["ema"]["w"], last["ema"]["w"])
    assert same(found["model"]["w"], (torch.load("a.pt")["model"]["w"] + last["model"]["w"]) / 2)


@pytest.mark.parametrize(("ints", "wanted"), [("first", [1, 5]), ("last", [4, 2]), ("max", [4, 5])])
def test_integers_have_no_average(ckpt: Ckpt, ints: str, wanted: list[int]) -> None:
    for name, steps in (("a", [1, 5]), ("b", [4, 2])):
        saved({"w": torch.ones(2), "steps": torch.tensor(steps), "alike": torch.arange(3)}, f"{name}.pt")
    refused = ckpt("avg", "a.pt", "b.pt", "-o", "out.pt")
    assert refused.code == 2
    assert "integers of 'steps' differ, and have no average" in refused.err
    assert ckpt("avg", "a.pt", "b.pt", "-o", "out.pt", "--ints", ints).code == 0
    assert torch.load("out.pt")["steps"].tolist() == wanted


def test_what_is_not_finite_is_said_and_refused_on_demand(ckpt: Ckpt) -> None:
    saved({"w": torch.tensor([1.0, float("nan")]), "v": torch.ones(1)}, "a.pt")
    saved({"w": torch.tensor([1.0, 2.0]), "v": torch.ones(1)}, "b.pt")
    answer = ckpt("avg", "a.pt", "b.pt", "-o", "out.pt")
    assert answer.code == 0
    assert "NaN or infinities in w: a.pt" in answer.err
    for more in ([], ["-n"]):
        refused = ckpt("avg", "a.pt", "b.pt", "-o", "other.pt", "--finite", *more)
        assert refused.code == 2
        assert not Path("other.pt").exists()


def test_sums_that_the_dtype_cannot_hold_are_refused(ckpt: Ckpt) -> None:
    for name in "ab":
        saved({"w": torch.full((3,), 40_000.0, dtype=torch.float16)}, f"{name}.pt")
    assert ckpt("avg", "a.pt", "b.pt", "-o", "out.pt").code == 0
    assert torch.load("out.pt")["w"].tolist() == [40_000] * 3
    answer = ckpt("avg", "a.pt", "b.pt", "--no-normalize", "-o", "sum.pt")
    assert answer.code == 2
    assert "3 finite sums are too large" in answer.err
    assert ckpt("avg", "a.pt", "b.pt", "--no-normalize", "-o", "sum.pt", "--dtype", "float32").code == 0


def test_weights_stand_after_a_colon_unless_the_path_is_there(ckpt: Ckpt) -> None:
    saved({"w": torch.tensor([1.0])}, "a.pt")
    saved({"w": torch.tensor([2.0])}, "b.pt:3")
    answer = ckpt("avg", "a.pt:3", "b.pt:3", "-o", "out.pt", "--json")
    report = json.loads(answer.out)
    assert report["inputs"] == [{"path": "a.pt", "weight": 3.0}, {"path": "b.pt:3", "weight": 1.0}]
    assert torch.load("out.pt")["w"] == 1.25
    for wrong in (["--weights", "1"], ["--weights", "1,x"], ["--weights", "1,-1"], ["--ema", "1"], ["--rest", "3"],
                  ["--weights", "nan,1"], ["--last", "1"]):  # fmt: skip
        answer = ckpt("avg", "a.pt", "b.pt:3", "-o", "out.pt", *wrong, "--force")
        assert answer.code == 2, wrong
        assert len(answer.err.splitlines()) <= 2


def test_the_last_checkpoints_of_a_run_in_the_order_of_their_numbers(ckpt: Ckpt) -> None:
    Path("run").mkdir()
    for step in (2, 9, 10, 11):
        saved({"w": torch.tensor([float(step)])}, f"run/step-{step}.pt")
    assert ckpt("avg", "run", "--last", "2", "-o", "out.pt").code == 0
    assert torch.load("out.pt")["w"] == 10.5


def test_nothing_is_replaced_without_force_and_a_dry_run_writes_nothing(ckpt: Ckpt) -> None:
    for number, state in enumerate(states(2)):
        saved(state, f"{number}.pt")
    assert ckpt("avg", "0.pt", "1.pt", "-o", "out.pt", "-n").code == 0
    assert not Path("out.pt").exists()
    assert ckpt("avg", "0.pt", "1.pt", "-o", "out.pt").code == 0
    before = Path("out.pt").read_bytes()
    answer = ckpt("avg", "0.pt", "1.pt:3", "-o", "out.pt")
    assert (answer.code, Path("out.pt").read_bytes()) == (2, before)
    assert ckpt("avg", "0.pt", "1.pt:3", "-o", "out.pt", "--force").code == 0
    assert ckpt("avg", "0.pt", "1.pt", "-o", "1.pt", "--force").code == 2


def test_each_checkpoint_is_opened_once_and_the_new_one_to_be_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pt", "b.pt", "c.pt"):
        torch.save({"w": torch.ones(3), "epoch": 1}, name)
    opened: list[str] = []
    open_file = opening._open_file
    monkeypatch.setattr(opening, "_open_file", lambda path, *rest: opened.append(path) or open_file(path, *rest))
    average(["a.pt", "b.pt", "c.pt"], "new.pt", AvgOptions())
    assert sorted(opened[:3]) == ["a.pt", "b.pt", "c.pt"]
    assert len(opened) == 4
    opened.clear()
    average(["a.pt", "b.pt"], "new.safetensors", AvgOptions(rest="drop"))
    assert sorted(path for path in opened if path.endswith(".pt")) == ["a.pt", "b.pt"]
