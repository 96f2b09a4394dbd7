"""Folders of DeepSpeed's ZeRO, as its engine writes them, of parameters that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

Named = Mapping[str, torch.Tensor]


def zero_folder(
    path: Path,
    stage: int,
    world: int,
    groups: Sequence[Named],
    *,
    frozen: Named | None = None,
    buffers: Named | None = None,
    shared: Mapping[str, str] | None = None,
    gaps: int = 0,
    tag: str = "global_step7",
) -> Path:
    """Write the files of a save: groups of float32 parameters, cut for `world` ranks.

    In stages 1 and 2, `gaps` is the padding after each parameter that newer versions may have.
    """
    folder = path / tag
    folder.mkdir(parents=True)
    (path / "latest").write_text(tag)
    frozen, buffers, shared = frozen or {}, buffers or {}, shared or {}
    parts, states = (_stage3 if stage == 3 else _stage2)(groups, world, gaps)
    for rank in range(world):
        flat = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        inner = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
        state = {
            number: {"step": torch.tensor(4.0), "exp_avg": vectors[rank] * 2} for number, vectors in enumerate(states)
        }
        optimizer: dict[str, Any] = {
            "zero_stage": stage,
            "partition_count": world if stage == 3 else [world] * len(groups),
            flat: [vectors[rank] for vectors in parts],
            inner: {"state": state, "param_groups": [{"lr": 0.5, "params": [n]} for n in range(len(groups))]},
        }
        if gaps:
            optimizer["param_alignment_paddings"] = [[gaps] * len(group) for group in groups]
        torch.save({"optimizer_state_dict": optimizer}, folder / optim_name(rank))
        if stage == 3 or rank == 0:
            torch.save(_model(groups, frozen, buffers, shared, stage, world, rank), folder / model_name(stage, rank))
    return path


def optim_name(rank: int) -> str:
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_name(stage: int, rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def change(file: Path, **values: Any) -> None:
    """Save a file again with other values; `None` takes a key out; keys with `__` are those of its optimizer."""
    saved = torch.load(file, weights_only=False)
    for key, value in values.items():
        within = saved["optimizer_state_dict"] if key.startswith("__") else saved
        within[key.removeprefix("__")] = value
        if value is None:
            del within[key.removeprefix("__")]
    torch.save(saved, file)


def _model(
    groups: Sequence[Named], frozen: Named, buffers: Named, shared: Mapping[str, str], stage: int, world: int, rank: int
) -> dict[str, Any]:
    trained = {name: tensor for group in groups for name, tensor in group.items()}
    whole = {**trained, **frozen, **{name: trained[kept] for name, kept in shared.items()}}
    module = {name: torch.empty(0) if stage == 3 else tensor.bfloat16() for name, tensor in whole.items()}
    fragments = {name: _cut(tensor, world)[rank] if stage == 3 else tensor for name, tensor in frozen.items()}
    return {
        "module": {**buffers, **module},
        "buffer_names": list(buffers),
        "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
        "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()} or None,
        "frozen_param_fragments": fragments or None,
        "shared_params": dict(shared) if rank == 0 else {},
        "global_steps": 7,
        "epoch": 3,
    }


def _cut(tensor: torch.Tensor, world: int) -> list[torch.Tensor]:
    """A tensor as stage 3 cuts it: equal parts, the last ones filled up."""
    each = -(-tensor.numel() // world)
    return list(pad(tensor.flatten(), (0, each * world - tensor.numel())).reshape(world, each).clone())


def _stage3(groups: Sequence[Named], world: int, _: int) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """The vectors of each group by rank; of one long list of parameters, cut anywhere, as subgroups are."""
    cuts = [_cut(tensor, world) for group in groups for tensor in group.values()]
    ranks = [torch.cat([torch.empty(0), *(cut[rank] for cut in cuts)]) for rank in range(world)]
    middle = ranks[0].numel() // 2
    parts = [[rank[:middle].clone() for rank in ranks], [rank[middle:].clone() for rank in ranks]]
    return parts, parts


def _stage2(
    groups: Sequence[Named], world: int, gaps: int
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """The vectors of each group by rank: copies without the padding at the end, and states with it."""
    parts, states = [], []
    for group in groups:
        flat = torch.cat([torch.empty(0), *(pad(tensor.flatten(), (0, gaps)) for tensor in group.values())])
        padding = -flat.numel() % (2 * world)
        ranks = [part.clone() for part in pad(flat, (0, padding)).reshape(world, -1)]
        states.append(ranks)
        parts.append([*ranks[:-1], ranks[-1][: ranks[-1].numel() - padding].clone()])
    return parts, states


def numbered(shapes: Sequence[tuple[int, ...]], name: str = "p") -> dict[str, torch.Tensor]:
    """Tensors of some shapes, no two elements alike."""
    found, first = {}, 1
    for number, shape in enumerate(shapes):
        found[f"{name}{number}"] = torch.arange(first, first + prod(shape), dtype=torch.float32).reshape(shape)
        first += prod(shape)
    return found
