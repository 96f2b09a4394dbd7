"""Checks of quantized weights: stored numbers and their scales must be there and fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckpt_cli.errors import CkptError, UnfittingError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.quantization import Group, quantized_groups
from ckpt_cli.ops.quantized_layout import Config, config_of
from ckpt_cli.ops.quantized_schemes import layout_of


@dataclass(frozen=True, slots=True)
class Quantized:
    """The checkpoints of a model, of which some weights may be quantized."""

    where: str
    checkpoints: Sequence[Checkpoint]
    complete: bool
    """True if all of the model is there."""

    @property
    def groups(self) -> Sequence[Group]:
        """The quantized weights among all tensors."""
        tensors = [tensor for checkpoint in self.checkpoints for tensor in checkpoint.tensors]
        return quantized_groups(self.checkpoints[0].path, tensors) if tensors else ()


def _shapes(subject: Quantized) -> Iterator[Occurrence]:
    groups = [group for group in subject.groups if group.parts]
    config = config_of(subject.checkpoints[0]) if groups else Config({})
    for group in groups:
        fault = _fault(subject.checkpoints[0], group, config)
        if fault:
            yield Occurrence(f"{subject.where}: {group.weight.name}", fault)


def _fault(checkpoint: Checkpoint, group: Group, config: Config) -> str:
    """Return in what a weight and its scales do not fit; empty for those that do, or of which that is not known."""
    try:
        layout_of(checkpoint, group, config)
    except UnfittingError as error:
        return error.problem
    except CkptError:  # of a scheme that is not known so well, or not to be read
        return ""
    return ""


def _no_scales(subject: Quantized) -> Iterator[Occurrence]:
    for group in _alone(subject):
        if not group.is_scale:
            message = f"seems to be {group.scheme}, and has no scales beside it"
            yield Occurrence(f"{subject.where}: {group.weight.name}", message)


def _no_weights(subject: Quantized) -> Iterator[Occurrence]:
    for group in _alone(subject):
        if group.is_scale:
            yield Occurrence(f"{subject.where}: {group.weight.name}", "has no quantized weight beside it")


def _alone(subject: Quantized) -> list[Group]:
    """Return the stored numbers and scales that stand alone though all of the model is there."""
    return [group for group in subject.groups if group.is_alone] if subject.complete else []


CHECKS: tuple[Check[Quantized], ...] = (
    Check("quantized-shape", "error", "the scales, zero points or groups of a quantized weight do not fit it", _shapes,
          "ckpt ls FILE shows their shapes"),
    Check("no-scales", "error", "quantized numbers lack the scales without which they mean nothing", _no_scales,
          "fetch or write all of the model again"),
    Check("no-weights", "warning", "there are scales of quantized weights, but not these weights", _no_weights,
          "ckpt rm FILE takes them out, if the weights are plain"),
)  # fmt: skip
