"""The optimizers in a file whose model is edited: left as they are, taken out, or carried along."""

from __future__ import annotations

from ckpt_cli.edits.plan import EditPlan, Planner
from ckpt_cli.errors import UsageError
from ckpt_cli.model.checkpoint import Checkpoint

CHOICES = ("trust", "drop", "leave")
"""What may be done with an optimizer: go by an order that fits, take it out, or leave it as it is."""


def carrying(plan: Planner, choice: str | None = None) -> Planner:
    """Return the planner of an edit that also carries the states of optimizers.

    `choice` is one of CHOICES, or None to refuse where it is not known which states belong to what is taken out.
    Raises UsageError for another choice.
    """
    if choice is not None and choice not in CHOICES:
        raise UsageError(f"{choice!r} is not one of {', '.join(CHOICES)}")

    def carried(checkpoint: Checkpoint) -> EditPlan:
        planned = plan(checkpoint)
        has_optimizer = any("param_groups." in entry.name for entry in checkpoint.entries)
        if choice == "leave" or planned.changes.root or not has_optimizer:
            return planned
        from ckpt_cli.edits.carried_states import carry

        return carry(checkpoint, planned, choice)

    return carried
