"""Small training runs by torch: a model, its optimizer in groups, and both with some parameters only.

A run with fewer parameters is made by torch alone, from the parameters and states of the whole one; so it says what
a checkpoint must load as after `ckpt rm` or `ckpt keep`.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]
Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "plain SGD": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "ASGD": lambda groups: torch.optim.ASGD(groups, lr=0.01),
}
"""Optimizers of torch, made of groups of parameters or of pairs with their names."""


@dataclass
class Run:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, seed: int) -> None:
        """Take a step with gradients that depend on the seed and on names alone."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {parameter_key(name)}".encode()))
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def load(self, model: Mapping[str, Any], optimizer: dict[str, Any]) -> Run:
        """Load what a checkpoint has of both."""
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        return self


def parameter_key(name: str) -> str:
    """Return the part of a name by which gradients are chosen: the same after a renaming of what it lies in."""
    return name.rpartition(".")[2]


def module(shapes: Mapping[str, Shape], ties: Mapping[str, str] | None = None, frozen: Iterable[str] = ()) -> nn.Module:
    """Return a module with parameters of these dotted names; `ties` has the name that each tied one repeats."""
    root = nn.Module()
    made: dict[str, nn.Parameter] = {}
    for name, shape in shapes.items():
        first = (ties or {}).get(name)
        if first in made:
            made[name] = made[first]
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(parameter_key(name).encode()))
            made[name] = nn.Parameter(torch.randn(shape, generator=generator), requires_grad=name not in frozen)
        holder = root
        *modules, last = name.split(".")
        for part in modules:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        holder.register_parameter(last, made[name])
    return root


def begin(model: nn.Module, make: Make, groups: Sequence[Sequence[str]], *, named: bool = False) -> Run:
    """Begin a run whose optimizer has groups of these parameters, with settings that differ."""
    known = dict(model.named_parameters())
    made = [
        {
            "params": [(name, known[name]) if named else known[name] for name in group if name in known],
            "weight_decay": 0.1 * number,
        }
        for number, group in enumerate(groups)
    ]
    return Run(model, make(made))


def selected(run: Run, groups: Sequence[Sequence[str]], kept: Sequence[str], make: Make, *, named: bool = False) -> Run:
    """Return the run as if it had had some of its parameters only: those of these names."""
    old = dict(run.model.named_parameters(remove_duplicate=False))
    firsts: dict[int, str] = {}
    ties = {name: first for name in kept if (first := firsts.setdefault(id(old[name]), name)) != name}
    frozen = [name for name in kept if not old[name].requires_grad]
    new = begin(module({name: tuple(old[name].shape) for name in kept}, ties, frozen), make, groups, named=named)
    with torch.no_grad():
        for name, parameter in new.model.named_parameters():
            parameter.copy_(old[name])
            if old[name] in run.optimizer.state:
                new.optimizer.state[parameter] = copy.deepcopy(run.optimizer.state[old[name]])
    return new


def saved(run: Run, *, lightning: bool = False) -> dict[str, Any]:
    """Return a checkpoint of a run."""
    if lightning:
        return {
            "epoch": 1,
            "global_step": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": run.model.state_dict(),
            "loops": {},
            "callbacks": {},
            "optimizer_states": [run.optimizer.state_dict()],
            "lr_schedulers": [],
        }
    return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "epoch": 3}


def same(a: object, b: object) -> bool:
    """True if two values are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def same_runs(a: Run, b: Run) -> bool:
    """True if models and optimizers are the same."""
    return same(dict(a.model.state_dict()), dict(b.model.state_dict())) and same(
        a.optimizer.state_dict(), b.optimizer.state_dict()
    )
