"""`to_json` of each result: data that json.dumps accepts, and exactly what the command prints with `--json`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt

from ckpt_cli.arrays.compare import Tolerance
from ckpt_cli.cli.app import COMMANDS
from ckpt_cli.cli.progress import workers
from ckpt_cli.edits import lora_merge
from ckpt_cli.edits.avg import average
from ckpt_cli.edits.avg_options import AvgOptions
from ckpt_cli.edits.convert import convert
from ckpt_cli.edits.convert_options import ConvertOptions
from ckpt_cli.edits.delta import CreateOptions, create
from ckpt_cli.edits.dequantize import dequantize
from ckpt_cli.edits.derive import DeriveOptions
from ckpt_cli.edits.lora_extract import extract
from ckpt_cli.edits.lora_resize import resize
from ckpt_cli.edits.lora_write import AdapterOptions
from ckpt_cli.edits.merge import MergeOptions, merge
from ckpt_cli.edits.meta import metadata_of
from ckpt_cli.edits.mix import MixOptions, mix
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.set import plan_set
from ckpt_cli.edits.transaction import transaction
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.nn.tree import tree_of
from ckpt_cli.ops.check.run import check
from ckpt_cli.ops.diff import Asked, diff
from ckpt_cli.ops.hash import compare, hash_tensors
from ckpt_cli.ops.info import summarize
from ckpt_cli.ops.lora import LoraInfo, adapter_of, describe
from ckpt_cli.ops.ls import list_entries, list_waste
from ckpt_cli.ops.match import match
from ckpt_cli.ops.match_states import state_of
from ckpt_cli.ops.scan import scan
from ckpt_cli.ops.series import series
from ckpt_cli.ops.show import show
from ckpt_cli.ops.stats import stats
from ckpt_cli.ops.steps import Source
from ckpt_cli.ops.ties import find_ties, judge
from ckpt_cli.render import avg as avg_render
from ckpt_cli.render import check as check_render
from ckpt_cli.render import convert as convert_render
from ckpt_cli.render import delta as delta_render
from ckpt_cli.render import dequantize as dequantize_render
from ckpt_cli.render import diff as diff_render
from ckpt_cli.render import edits as edits_render
from ckpt_cli.render import hash as hash_render
from ckpt_cli.render import info as info_render
from ckpt_cli.render import lora as lora_render
from ckpt_cli.render import ls as ls_render
from ckpt_cli.render import match as match_render
from ckpt_cli.render import merge as merge_render
from ckpt_cli.render import meta as meta_render
from ckpt_cli.render import mix as mix_render
from ckpt_cli.render import scan as scan_render
from ckpt_cli.render import series as series_render
from ckpt_cli.render import show as show_render
from ckpt_cli.render import stats as stats_render
from ckpt_cli.render import ties as ties_render
from ckpt_cli.render import tree as tree_render
from ckpt_cli.render.json import LongList, json_text, rows

EDITS = {
    "graft",
    "resize",
    "apply",
    "set",
    "rename",
    "rm",
    "keep",
    "cast",
    "tie",
    "untie",
    "compact",
    "to",
    "index",
    "undo",
}
"""Commands that share `render/edits.py`."""


Result = Callable[[Checkpoint, Checkpoint, Executor], object]
"""Makes the data of a result from the checkpoints m.pt and n.pt."""


def listed(m: Checkpoint, _n: Checkpoint, _executor: Executor) -> object:
    listing = list_entries(m, (), values=True, sort=None)
    return ls_render.to_json(listing, listing.entries)


def differing(m: Checkpoint, n: Checkpoint, executor: Executor) -> object:
    return diff_render.to_json(diff(m, n, Asked((), (), False), Tolerance(0, 0, False, 3), executor))


def verified(m: Checkpoint, n: Checkpoint, executor: Executor) -> object:
    manifest, found = (hash_tensors(checkpoint, "blake3", executor) for checkpoint in (n, m))
    return hash_render.verdict_to_json("m.pt", compare(manifest, found))


def metadata(_m: Checkpoint, _n: Checkpoint, _executor: Executor) -> object:
    with closing(open_checkpoint("m.safetensors")) as checkpoint:
        return meta_render.to_json(metadata_of(checkpoint, ()), None)


def edited(_m: Checkpoint, _n: Checkpoint, _executor: Executor) -> object:
    return edits_render.to_json(
        transaction("m.pt", lambda checkpoint: plan_set(checkpoint, ["epoch=4"]), EditOptions(dry_run=True))
    )


def converted(_m: Checkpoint, _n: Checkpoint, _executor: Executor) -> object:
    return convert_render.to_json(convert("m.pt", "out.npz", ConvertOptions(dry_run=True, tensors_only=True)))


def followed(m: Checkpoint, n: Checkpoint, executor: Executor) -> object:
    sources = [Source(each.path, partial(nullcontext, each)) for each in (m, n)]
    return series_render.to_json(series(sources, (), executor), "norm")


def averaged(_m: Checkpoint, _n: Checkpoint, executor: Executor) -> object:
    new = DeriveOptions(dry_run=True, executor=executor)
    return avg_render.to_json(average(["m.pt", "m.pt"], "out.pt", AvgOptions(output=new)))


def described(path: str) -> LoraInfo:
    with closing(open_checkpoint(path)) as checkpoint:
        return describe(adapter_of(checkpoint, path))


def extracted(_m: Checkpoint, _n: Checkpoint, _executor: Executor) -> object:
    new = AdapterOptions(dry_run=True)
    return lora_render.extract_json(extract("lora/base.safetensors", "lora/merged.safetensors", "out", 2, new))


def resized(_m: Checkpoint, _n: Checkpoint, _executor: Executor) -> object:
    return lora_render.resize_json(resize("lora/adapter", "out", 2, AdapterOptions(dry_run=True)))


def merged(_m: Checkpoint, _n: Checkpoint, executor: Executor) -> object:
    new = DeriveOptions(dry_run=True, executor=executor)
    return merge_render.to_json(merge(["m.pt", "n.pt"], "out.pt", MergeOptions("first", output=new)))


def mixed(_m: Checkpoint, _n: Checkpoint, executor: Executor) -> object:
    new = DeriveOptions(dry_run=True, executor=executor)
    return mix_render.to_json(mix("m.pt", ["m.pt"], "out.pt", MixOptions("task", output=new)))


def dequantized(_m: Checkpoint, _n: Checkpoint, executor: Executor) -> object:
    new = DeriveOptions(dry_run=True, executor=executor)
    return dequantize_render.to_json(dequantize("quantized/model.safetensors", "out.safetensors", None, new))


def lora_merged(_m: Checkpoint, _n: Checkpoint, executor: Executor) -> object:
    new = lora_merge.MergeOptions(output=DeriveOptions(dry_run=True, executor=executor))
    done = lora_merge.merge("lora/base.safetensors", [("lora/adapter", 1.0)], "out.safetensors", new)
    return lora_render.merge_json(done)


def different(_m: Checkpoint, _n: Checkpoint, executor: Executor) -> object:
    return delta_render.to_json(create("m.pt", "m.pt", "out.safetensors", executor, CreateOptions(dry_run=True)))


CASES: dict[str, Result] = {
    "ls m.pt -a": listed,
    "ls m.pt --waste": lambda m, _n, _executor: ls_render.waste_to_json("m.pt", list_waste(m, ())),
    "info m.pt": lambda m, _n, _executor: info_render.to_json(summarize(m)),
    "tree m.pt": lambda m, _n, _executor: tree_render.to_json(tree_of(m, None), tree_render.View()),
    "show m.pt": lambda m, _n, _executor: show_render.to_json(show(m, (), raw=False)),
    "ties m.pt": lambda m, _n, _executor: ties_render.to_json(find_ties(m, equal=False)),
    "ties m.pt a.weight b.weight": lambda m, _n, _e: ties_render.verdict_to_json(judge(m, "a.weight", "b.weight")),
    "stats m.pt": lambda m, _n, executor: stats_render.to_json(stats(m, (), executor)),
    "series m.pt n.pt": followed,
    "diff m.pt n.pt": differing,
    "match m.pt n.pt": lambda m, n, _e: match_render.to_json(match(state_of(m), state_of(n, aliases=True))),
    "check m.pt": lambda _m, _n, _executor: check_render.to_json(check("m.pt")),
    "scan m.pt": lambda _m, _n, _executor: scan_render.to_json(scan("m.pt")),
    "hash m.pt": lambda m, _n, executor: hash_render.to_json(hash_tensors(m, "blake3", executor)),
    "hash m.pt --verify n.json": verified,
    "meta m.safetensors": metadata,
    "set m.pt epoch=4 -n": edited,
    "avg m.pt m.pt -o out.pt -n": averaged,
    "merge m.pt n.pt -o out.pt -n --prefer first": merged,
    "mix m.pt m.pt --method task -o out.pt -n": mixed,
    "dequantize quantized/model.safetensors -o out.safetensors -n": dequantized,
    "lora merge lora/base.safetensors lora/adapter -o out.safetensors -n": lora_merged,
    "delta create m.pt m.pt -o out.safetensors -n": different,
    "lora info lora/adapter": lambda _m, _n, _e: lora_render.info_json(described("lora/adapter")),
    "lora extract lora/base.safetensors lora/merged.safetensors --rank 2 -o out -n": extracted,
    "lora resize lora/adapter --rank 2 -o out -n": resized,
    "convert m.pt out.npz -n --tensors-only": converted,
}


def plain(data: object) -> object:
    """The data through json.dumps, which refuses what is not JSON."""
    return json.loads(json.dumps(data, default=list, allow_nan=False))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Ckpt) -> None:
    """Checkpoints with tied, sparse, quantized, empty and long entries, and a manifest."""
    monkeypatch.chdir(tmp_path)
    weight = torch.arange(6.0).reshape(2, 3)
    state: dict[str, Any] = {
        "a.weight": weight, "b.weight": weight, "part": torch.zeros(100)[:10], "sparse": torch.eye(3).to_sparse(),
        "empty": torch.empty(2, 0), "large": torch.arange(200_000).reshape(2, -1), "nan": torch.tensor([float("nan")]),
        "long": list(range(250)), "epoch": 3,
    }  # fmt: skip
    torch.save(state, "m.pt")
    torch.save({**state, "a.weight": weight + 1, "epoch": 5}, "n.pt")
    ckpt("convert", "m.pt", "m.safetensors", "--tensors-only")
    shutil.copytree(Path(__file__).parent.parent / "samples" / "lora" / "linear", "lora")
    shutil.copytree(Path(__file__).parent.parent / "samples" / "quantized" / "deepseek", "quantized")
    Path("n.json").write_text(ckpt("hash", "n.pt", "--json").out)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("command", CASES)
def test_the_data_of_a_result_is_what_the_command_prints(ckpt: Ckpt, command: str) -> None:
    with closing(open_checkpoint("m.pt")) as m, closing(open_checkpoint("n.pt")) as n, workers(1) as executor:
        data = plain(CASES[command](m, n, executor))
    assert json.loads(ckpt(*command.split(), "--json").out) == data


def test_every_command_has_a_case() -> None:
    assert {command.split()[0] for command in CASES} | EDITS == set(COMMANDS)


def test_a_long_list_is_written_while_it_is_made() -> None:
    made = []

    def make() -> Iterator[object]:
        for number in range(1000):
            made.append(number)
            yield {"number": number}

    text = json_text({"rows": rows(make), "end": 1})
    while len(made) < 10:
        next(text)
    assert len(made) == 10
    assert json.loads("".join(json_text({"rows": rows(make), "end": 1})))["rows"][-1] == {"number": 999}


def test_data_nested_deeper_than_python_recurses_is_written() -> None:
    def nested(depth: int) -> object:
        return {"children": rows(lambda: [nested(depth + 1)] if depth < 5000 else [])}

    assert "".join(json_text(nested(0))).count("children") == 5001


@pytest.mark.parametrize("data", [{}, [], {"a": {}}, {"a": [1, 2]}, None, "x"])
def test_small_data_is_written_as_json_dumps_writes_it(data: object) -> None:
    assert "".join(json_text(data)) == json.dumps(data) + "\n"


def test_pieces_of_a_list_are_one_list() -> None:
    pieces = [[1, 2], [3], [[4, 5]]]
    assert "".join(json_text(LongList(lambda: pieces))) == "[1, 2, 3, [4, 5]]\n"
    assert json.dumps(LongList(lambda: pieces), default=list) == "[1, 2, 3, [4, 5]]"
    assert "".join(json_text({"none": rows(list)})) == '{"none": []}\n'
