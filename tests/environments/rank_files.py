"""Hold joined files of ranks to what the frameworks that wrote them put together, for 1 to 8 ranks.

`make environments` runs this. DeepSpeed and torch's FSDP train a small model with odd, tied, frozen and 0-dim tensors
on as many processes, with gloo on the CPU; from 6 ranks on some have empty parts. What `ckpt` reads is compared with
zero_to_fp32, with the live parameters, with what ds_to_universal makes, with the full state dict of FSDP, and with the
loader of torch.distributed.checkpoint.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "samples")]
OUT = Path(os.environ.setdefault("RANKS_OUT", tempfile.mkdtemp()))
"""Where all processes write; the generator reads it."""

import generate_ranks as generate  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import multiprocessing  # noqa: E402

import ckpt_cli  # noqa: E402

ZERO = {  # name: ranks, stage, bfloat16, two groups
    "one-1": (1, 1, True, False), "one-5": (5, 1, False, True), "two-2": (2, 2, True, True),
    "two-7": (7, 2, False, False), "three-1": (1, 3, True, False), "three-4": (4, 3, True, True),
    "three-8": (8, 3, True, False),
}  # fmt: skip
FSDP = {  # name: ranks, mesh, FSDP of before torch 2.4
    "new-1": (1, (1,), False), "new-2": (2, (2,), False), "new-6": (6, (6,), False), "hybrid-8": (8, (2, 4), False),
    "old-3": (3, (), True), "old-8": (8, (), True),
}  # fmt: skip


def values_of(path: Path, inside: str = "model.") -> dict[str, torch.Tensor]:
    """The tensors below a prefix, as a user reads them."""
    with ckpt_cli.open(path) as checkpoint:
        return {name.removeprefix(inside): checkpoint[name].torch() for name in checkpoint if name.startswith(inside)}


def compare(what: str, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raise unless all that is wanted was found, bit by bit."""
    for name, tensor in wanted.items():
        same = found[name].to(tensor.dtype)
        assert same.shape == tensor.shape, f"{what}: {name} is {tuple(same.shape)}, not {tuple(tensor.shape)}"
        assert torch.equal(same, tensor), f"{what}: {name} has other values"
    print(f"{what}: {len(wanted)} tensors are equal", flush=True)


def zero(name: str, port: int) -> None:
    """Train with ZeRO, and compare with zero_to_fp32, the live values, and the universal checkpoint."""
    world, *options = ZERO[name]
    multiprocessing.start_processes(generate.zero, (world, port, name, *options), world, start_method="spawn")
    generate.join(name)
    found = values_of(OUT / name)
    compare(f"zero {name}, zero_to_fp32", found, load_file(OUT / f"{name}.safetensors"))
    live = torch.load(OUT / f"{name}.live.pt")
    compare(f"zero {name}, live parameters", found, live)
    generate.universal(name, f"{name}-universal")
    compare(f"zero {name}, universal", values_of(OUT / f"{name}-universal"), found)
    states = {
        f"{file.parent.name}.{file.stem}": torch.load(file)
        for file in (OUT / f"{name}-universal").glob("*/zero/*/exp_avg*.pt")
    }
    wanted = {
        key: (state["param"] if isinstance(state, dict) else state).view_as(live[key.rpartition(".")[0]])
        for key, state in states.items()
    }
    compare(f"zero {name}, states in the universal", values_of(OUT / name, "optimizer.state."), wanted)
    compare(f"zero {name}, states of the universal", values_of(OUT / f"{name}-universal", "optimizer.state."), wanted)


def fsdp(name: str, port: int) -> None:
    """Train with FSDP, and compare with its full state dict and with torch.distributed.checkpoint's loader."""
    world, *options = FSDP[name]
    multiprocessing.start_processes(generate.fsdp, (world, port, name, *options), world, start_method="spawn")
    found = values_of(OUT / name)
    wanted = load_file(OUT / f"{name}.safetensors")
    compare(f"fsdp {name}, full state dict", found, wanted)
    if (OUT / f"{name}.dcp").exists():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp_to_torch_save(OUT / f"{name}.dcp", OUT / f"{name}.pt")
        compare(f"fsdp {name}, dcp_to_torch_save", found, torch.load(OUT / f"{name}.pt")["model"])
        compare(f"fsdp {name}, its distributed checkpoint", values_of(OUT / f"{name}.dcp"), wanted)


if __name__ == "__main__":
    chosen = sys.argv[1:] or [*ZERO, *FSDP]
    for number, name in enumerate(chosen):
        (zero if name in ZERO else fsdp)(name, 29500 + number)
