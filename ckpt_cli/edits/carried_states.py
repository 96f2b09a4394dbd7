"""The states of an optimizer, carried along where parameters of its model are taken out or get other names.

torch.optim numbers the parameters of all groups from 0 on, without gaps. So where one goes, its number leaves `params`,
its state goes, and all later numbers move up, as torch would have packed them. Names in the file follow a renaming.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ckpt_cli.edits.plan import Carried, EditPlan
from ckpt_cli.errors import RefusedError
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor, Value
from ckpt_cli.model.names import Below, Holders
from ckpt_cli.ops.optimizer_pairing import KNOWN, Pairing, pairings_of
from ckpt_cli.ops.optimizer_states import Optimizer, Slot

Key = int | str
"""What stands for a parameter in an optimizer."""


def carry(checkpoint: Checkpoint, plan: EditPlan, choice: str | None = None) -> EditPlan:
    """Return the plan of an edit with the changes that it makes necessary in optimizers; others are not looked at.

    Raises RefusedError where parameters go, and it is not known which states are theirs.
    """
    carrier = _Carrier(checkpoint, plan.changes, trusts=choice == "trust")
    pairings = pairings_of(checkpoint)
    if choice == "drop":
        carrier.drop([pairing.optimizer for pairing in pairings])
    else:
        for pairing in pairings:
            carrier.carry(pairing)
    return carrier.planned(plan) if carrier.done else plan


class _Carrier:
    """An edit, and the further changes that it makes necessary in optimizers."""

    def __init__(self, checkpoint: Checkpoint, asked: Changes, *, trusts: bool) -> None:
        self._checkpoint = checkpoint
        self._asked = asked
        self._trusts = trusts
        self._below = Below(asked.dropped_prefixes)
        self._names: dict[str, str] = {}
        self._values: dict[str, object] = {}
        self._dropped: set[str] = set()
        self._prefixes: set[str] = set()
        self.done: list[Carried] = []

    def planned(self, plan: EditPlan) -> EditPlan:
        """Return the plan of the edit with all changes."""
        changes = replace(
            self._asked,
            names={**self._asked.names, **self._names},
            values={**self._asked.values, **self._values},
            dropped=self._asked.dropped | self._dropped,
            dropped_prefixes=self._asked.dropped_prefixes | self._prefixes,
        )
        kept = [name for name in plan.changed if name not in self._dropped]  # of what `keep` names, some goes now
        return replace(plan, changes=changes, changed=kept, carried=self.done, following=self._names.keys())

    def _is_gone(self, name: str) -> bool:
        """True for an entry that the edit takes out."""
        return name in self._asked.dropped or name in self._below

    def drop(self, optimizers: Sequence[Optimizer]) -> None:
        """Take optimizers out, and the list that they are in where nothing else is in it."""
        optimizers = [optimizer for optimizer in optimizers if optimizer.prefix]
        own = Below(optimizer.prefix for optimizer in optimizers)
        others = [entry.name for entry in self._checkpoint.entries if entry.name not in own]
        for optimizer in optimizers:
            holder, _, last = optimizer.prefix.rpartition(".")
            is_alone = last.isdecimal() and not any(name.startswith(f"{holder}.") for name in others)
            self._prefixes.add(holder if is_alone else optimizer.prefix)
            self.done.append(Carried(optimizer.prefix, "dropped"))
        self._dropped.update(entry.name for entry in self._checkpoint.entries if entry.name in own)

    def carry(self, pairing: Pairing) -> None:
        """Carry the states of one optimizer."""
        lists = [group.settings["params"].name for group in pairing.optimizer.groups if "params" in group.settings]
        if any(map(self._is_gone, lists)):
            return  # the edit takes the optimizer out
        after = {slot.key: slot.name for slot in pairing.optimizer.slots}
        if self._asked.names and pairing.how == "named":
            self._rename(pairing, after)
        if self._asked.dropped and not all(self._is_gone(tensor.name) for tensor in pairing.scope.candidates):
            self._remove(pairing, after)
        self._commit(pairing.optimizer, after)

    # --- parameters that go ------------------------------------------------------------------------------------------

    def _remove(self, pairing: Pairing, after: dict[Key, str | None]) -> None:
        """Take the parameters that go out of the optimizer."""
        if pairing.how not in KNOWN and not (pairing.how == "order" and self._trusts):
            if any(self._is_gone(tensor.name) for tensor in pairing.scope.candidates):
                raise self._refusal(pairing)
            return
        hit = [(slot, tensor) for slot, tensor in pairing.pairs if tensor is not None and self._is_gone(tensor.name)]
        staying = self._staying(pairing) if hit else {}
        gone: list[str] = []
        moved: list[str] = []
        for slot, tensor in hit:
            if (other := staying.get(tensor.view)) is None:
                gone.append(pairing.name_of(tensor))
                del after[slot.key]
            else:
                self._require_trust(pairing, tensor, other)
                if slot.name is not None:
                    after[slot.key] = _as_named(slot.name, pairing.name_of(tensor), pairing.name_of(other))
                    moved.append(pairing.name_of(tensor))
        for action, names in (("removed", gone), ("renamed", moved)):
            if names:
                carried = Carried(pairing.optimizer.prefix, action, tuple(names), pairing.how, pairing.hypothesis)
                self.done.append(carried)

    def _staying(self, pairing: Pairing) -> dict[object, Tensor]:
        """Return the first of the names that stay of each tensor of the model, by its view."""
        found: dict[object, Tensor] = {}
        for tensor in self._checkpoint.tensors:
            if tensor.view is not None and not self._is_gone(tensor.name) and pairing.is_in_scope(tensor):
                found.setdefault(tensor.view, tensor)
        return found

    def _require_trust(self, pairing: Pairing, tensor: Tensor, other: Tensor) -> None:
        """Refuse to take the first name of a tied parameter out of a model whose optimizer has numbers."""
        if pairing.optimizer.layout == "numbers" and not self._trusts:
            raise RefusedError(
                f"{tensor.name!r} is tied to {other.name!r}, which stays: by that name the parameter may have another "
                "place among the optimizer's",
                path=self._checkpoint.path,
                hint="--optimizer trust keeps its place, drop takes the optimizer out, leave changes nothing in it",
            )

    def _refusal(self, pairing: Pairing) -> RefusedError:
        name = f"of {pairing.optimizer.prefix!r}" if pairing.optimizer.prefix else "of the optimizer"
        why, trust = pairing.reason, "--optimizer "
        if pairing.how == "order":
            why = f"the shapes fit an order ({pairing.hypothesis}), which is no proof"
            trust = "--optimizer trust goes by that order, "
        return RefusedError(
            f"it is not known which states {name} belong to what is taken out: {why}",
            path=self._checkpoint.path,
            hint=f"{trust}drop takes the optimizer out, leave changes nothing in it",
        )

    # --- parameters with other names ---------------------------------------------------------------------------------

    def _rename(self, pairing: Pairing, after: dict[Key, str | None]) -> None:
        """Give the optimizer the new names of parameters, where it has their names."""
        names, prefix = self._asked.names, self._new_prefix(pairing)
        done = []
        for slot, tensor in pairing.pairs:
            if tensor is None or slot.name is None or tensor.name not in names:
                continue
            new = names[tensor.name]
            new = new[len(prefix) + 1 :] if prefix and new.startswith(f"{prefix}.") else new
            own = _as_named(slot.name, pairing.name_of(tensor), new)
            if own != slot.name:
                after[slot.key] = own
                done.append(pairing.name_of(tensor))
        if done:
            self.done.append(Carried(pairing.optimizer.prefix, "renamed", tuple(done), pairing.how))

    def _new_prefix(self, pairing: Pairing) -> str:
        """Return the name that those of the model begin with after the renaming."""
        names = self._asked.names
        before = pairing.scope.prefix
        if not before or not pairing.scope.named:
            return before
        after = {old: names.get(tensor.name, tensor.name) for old, tensor in pairing.scope.named.items()}
        if all(new.startswith(f"{before}.") for new in after.values()):
            return before
        old, new = next(iter(after.items()))
        holder = new[: -len(old) - 1] if new.endswith(f".{old}") else ""
        return holder if holder and all(name.startswith(f"{holder}.") for name in after.values()) else before

    # --- what becomes of an optimizer --------------------------------------------------------------------------------

    def _commit(self, optimizer: Optimizer, after: Mapping[Key, str | None]) -> None:
        """Add the changes after which an optimizer has some of its parameters, under some names."""
        keys: dict[Key, Key] = {}
        for number, (key, name) in enumerate(after.items()):
            keys[key] = key if optimizer.layout != "numbers" and name is None else name or key
            if optimizer.layout == "numbers":
                keys[key] = number if len(after) < len(optimizer.slots) else key
        holders = Holders(str(slot.key) for slot in optimizer.slots)
        for slot in optimizer.slots:
            if slot.key not in keys:
                self._drop_state(optimizer, slot, is_holder=str(slot.key) in holders)
            elif keys[slot.key] != slot.key:
                self._rename_all(optimizer, "state", slot, slot.states.values(), keys[slot.key])
                if optimizer.layout == "flat" and slot.group is not None:
                    settings = slot.group.settings.values()
                    self._rename_all(optimizer, "param_groups", slot, settings, keys[slot.key])
        for group in optimizer.groups:
            staying = [key for key in group.keys if key in keys]
            self._set(group.settings.get("params"), [keys[key] for key in staying])
            if optimizer.layout == "numbers" and "param_names" in group.settings:
                self._set(group.settings["param_names"], [after[key] for key in staying])

    def _drop_state(self, optimizer: Optimizer, slot: Slot, *, is_holder: bool) -> None:
        """Take the state of a parameter out, and where settings stand beside its name, these too.

        `is_holder` is True if names of other parameters lie below its own.
        """
        entries = {"state": slot.states.values()}
        if optimizer.layout == "flat" and slot.group is not None:
            entries["param_groups"] = slot.group.settings.values()
        for kind, own in entries.items():
            self._dropped.update(entry.name for entry in own)
            if own and not is_holder:
                self._prefixes.add(optimizer.path(kind, slot.key))

    def _rename_all(self, optimizer: Optimizer, kind: str, slot: Slot, entries: Iterable[Entry], key: Key) -> None:
        """Give what stands beside a number or a name another one, also where the edit renames what it lies in."""
        before = len(optimizer.path(kind, slot.key))
        for entry in entries:
            rest = entry.name[before:]
            now, inside = self._asked.names.get(entry.name, entry.name), f"{kind}.{slot.key}{rest}"
            if f".{now}".endswith(f".{inside}"):
                self._names[entry.name] = f"{now[: len(now) - len(inside)]}{kind}.{key}{rest}"

    def _set(self, entry: Entry | None, items: list[object]) -> None:
        """Give a list of a group other items, where they are others."""
        if isinstance(entry, Value) and isinstance(entry.value, list | tuple) and list(entry.value) != items:
            self._values[entry.name] = items


def _as_named(own: str, before: str, after: str) -> str:
    """Return the name that an optimizer has for a parameter from now on: it may have that of a wrapped module."""
    if own == before:
        return after
    if own.endswith(f".{before}"):
        return own[: -len(before)] + after
    if before.endswith(f".{own}"):
        return after.removeprefix(before[: -len(own)])
    return after
