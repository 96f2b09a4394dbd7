"""Plans of edits cost little for each name, however many names there are and however many parts they have."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.edits.cast import plan_cast
from ckpt_cli.formats import open_checkpoint

MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    "line",
    [
        "keep FILE c",
        "keep FILE --root nothing",
        "rm FILE c",
        "rename FILE c x",
        "rename FILE nothing x",
        "convert FILE OUT --select nothing",
    ],
)
def test_names_of_thousands_of_parts_are_edited_in_little_memory(line: str, tmp_path: Path, ckpt: Ckpt) -> None:
    names = [*("a." * 30_000 + str(number) for number in range(8)), "c", "d"]
    path, new = tmp_path / "deep.pt", tmp_path / "new.pt"
    torch.save({name: torch.zeros(1) for name in names}, path)
    arguments: list[str | Path] = [{"FILE": path, "OUT": new}.get(word, word) for word in line.split()]
    if "OUT" not in line:
        arguments += ["-o", new]
    tracemalloc.start()
    code = ckpt(*arguments).code
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == (2 if "nothing" in line else 0)
    assert peak < 24 * MEGABYTE


class Counted(str):
    """A name that counts how often it is compared with another one."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_the_plan_of_a_cast_compares_each_name_a_few_times(tmp_path: Path) -> None:
    path, count = tmp_path / "many.safetensors", 500
    save_file({f"layers.{number}.weight": torch.zeros(2) for number in range(count)}, path)
    checkpoint = open_checkpoint(str(path))
    entries = [replace(entry, name=Counted(entry.name)) for entry in checkpoint.entries]
    plan = plan_cast(replace(checkpoint, entries=entries), BY_NAME["bfloat16"], [])
    checkpoint.close()
    assert (len(plan.changed), tuple(plan.also_changed)) == (count, ())
    assert Counted.compared < 20 * count
