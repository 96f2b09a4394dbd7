"""Code that uses every public name of `ckpt_cli`: run by a test, and checked by mypy, as code of a user would be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ckpt_cli

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ckpt_cli.ops.check.run import Report
    from ckpt_cli.ops.differences import Diff
    from ckpt_cli.ops.hash import Hashes, Verdict
    from ckpt_cli.ops.match import Match
    from ckpt_cli.ops.optimizer_listing import OptimizerListing
    from ckpt_cli.ops.scan import Scan
    from ckpt_cli.ops.series import Series
    from ckpt_cli.ops.summaries import Stats


LORA = Path(__file__).parent.parent / "samples" / "lora" / "linear"


def look(path: Path) -> dict[str, list[float]]:
    """Return the first row of each tensor, taken in all the ways that there are."""
    found: dict[str, list[float]] = {}
    checkpoint: ckpt_cli.Checkpoint
    with ckpt_cli.open(path) as checkpoint:
        tensor: ckpt_cli.Tensor
        for tensor in checkpoint.tensors:
            name: str = tensor.name
            shape: tuple[int, ...] | None = tensor.shape
            assert shape is not None
            row: NDArray[Any] = tensor[0]
            whole: NDArray[Any] = tensor.numpy()
            again: NDArray[Any] = np.asarray(tensor)
            values: torch.Tensor = tensor.torch()
            assert np.array_equal(whole, again)
            assert tuple(values.shape) == shape
            found[name] = np.ravel(row).tolist()
        entry: object = checkpoint["epoch"]
        assert entry == 3
        view = checkpoint["model"]
        assert isinstance(view, ckpt_cli.View)
        below: list[str] = [each.name for each in view.tensors]
        assert below == list(found)
        stats: Stats = checkpoint.stats("model", exclude=["*.b"], total=True, sort="std", jobs=1)
        rows: list[dict[str, Any]] = stats.rows()
        assert len(rows) == 1
    loaded: dict[str, torch.Tensor] = ckpt_cli.load(path)
    assert list(loaded) == list(found)
    return found


def states_of(path: Path, model: Path) -> list[dict[str, object]]:
    """Return a row for each parameter of a model, with its state in the optimizer of another file."""
    with ckpt_cli.open(path) as checkpoint, ckpt_cli.open(model) as other:
        listing: OptimizerListing = checkpoint.optimizer("*", model=other)
        again: OptimizerListing = checkpoint.optimizer("bias", "weight", model=model)
        assert {row.name for row in listing.states} == {row.name for row in again.states}
        hows: list[str | None] = [each.how for each in listing.optimizers]
        assert hows == ["named"]
        return listing.rows()


def ask(path: Path, other: str, manifest: Path) -> list[dict[str, Any]]:
    """Return the rows of the difference of two checkpoints, after all other questions."""
    report: Report = ckpt_cli.check(path, deep=True, allow="zeros")
    scan: Scan = ckpt_cli.scan(path)
    hashes: Hashes = ckpt_cli.hash(path, "model", algorithm="blake3")
    verdict: Verdict = ckpt_cli.hash(path, verify=manifest)
    findings: list[dict[str, str]] = [*report.rows(), *scan.rows(), *hashes.rows(), *verdict.rows()]
    assert all("name" in each for each in findings)
    match: Match = ckpt_cli.match(path, other, of="model")
    loads: bool = match.loads
    commands: list[str] = match.commands
    assert (loads, len(commands)) == (not match.rows(), len(match.cures))
    with ckpt_cli.open(path) as checkpoint:
        run: Series = ckpt_cli.series([checkpoint, other], fold=True, jobs=1)
        points: list[dict[str, Any]] = run.rows()
        assert all("change" in point for point in points)
        difference: Diff = ckpt_cli.diff(checkpoint, other, strip="model", rtol=1e-3, ignore_dtype=True)
    return difference.rows()


def edit(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the reports of all edits, one after the other, on one file and its copies."""
    out, plain = folder / "out.pt", folder / "plain.safetensors"
    done: list[dict[str, Any]] = [
        ckpt_cli.set(path, {"model.w[0,0]": 100, "model.b *=": 2.0, "epoch": 4}, backup=True),
        ckpt_cli.undo(path, dry_run=True),
        ckpt_cli.keep(path, root="model", output=out),
        ckpt_cli.rename(out, sub=[("^w$", "weight")], map={"b": "bias"}),
        ckpt_cli.set(out, {"more": np.ones((2, 2), np.float32)}, new=True),
        ckpt_cli.tie(out, "weight", "more", force=True),
        ckpt_cli.untie(out, "more"),
        ckpt_cli.cast(out, "bfloat16", "weight"),
        ckpt_cli.compact(out),
        ckpt_cli.to(out, "cuda:0", dry_run=True),
        ckpt_cli.resize(out, {"bias": "9:zero"}, optimizer="leave", dry_run=True),
        ckpt_cli.rm(out, "more"),
        ckpt_cli.keep(out, exclude="weight", dry_run=True),
        ckpt_cli.convert(out, plain, max_shard=None),
        ckpt_cli.meta(plain, {"note": "mine"}, delete=()),
        ckpt_cli.meta(plain),
        ckpt_cli.convert(plain, folder / "shards", max_shard="8B"),
        ckpt_cli.avg([plain, folder / "shards"], folder / "mean.safetensors", weights=[0.5, 0.5]),
        ckpt_cli.dequantize(folder / "fp8.safetensors", folder / "floats.safetensors", dtype="float16"),
        ckpt_cli.merge([out, plain], folder / "both.pt", prefixes={plain: "plain"}),
        ckpt_cli.mix(plain, [folder / "shards"], folder / "mix.safetensors", method="ties", weights=[0.5]),
        ckpt_cli.delta_create(plain, folder / "mean.safetensors", folder / "delta.safetensors"),
        ckpt_cli.apply(plain, {"version": 1, "step": [{"cast": "float16"}]}, folder / "recipe.safetensors"),
        ckpt_cli.delta_apply(plain, folder / "delta.safetensors", folder / "applied.safetensors"),
        ckpt_cli.graft(out, plain, add=True, partial=True, dry_run=True),
        ckpt_cli.lora_info(LORA / "adapter", base=LORA / "base.safetensors"),
        ckpt_cli.lora_merge(LORA / "base.safetensors", LORA / "adapter", folder / "m.pt"),
        ckpt_cli.lora_extract(LORA / "base.safetensors", folder / "m.pt", folder / "extracted", rank=2),
        ckpt_cli.lora_resize(folder / "extracted", folder / "smaller", rank=1),
        ckpt_cli.index(folder / "shards", dry_run=True),
    ]
    try:
        ckpt_cli.rm(path, "nothing")
    except ckpt_cli.CkptError as error:
        hint: str | None = error.hint
        done.append({"problem": error.problem, "hint": hint})
    return done
