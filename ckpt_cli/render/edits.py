"""Reports of edits as text and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.errors import listed, quoted
from ckpt_cli.render.text import brief_name, bytes_text, count_text, escaped, name_text

if TYPE_CHECKING:
    from ckpt_cli.edits.files_beside import Beside
    from ckpt_cli.edits.folded import Folded
    from ckpt_cli.edits.plan import Carried, EditResult, Fit

_MOST = 8
"""Names, or folded ones, that are spelled out: as many as edits/plan.py leaves unfolded."""


def to_json(edit: EditResult) -> dict[str, object]:
    """Return the report as docs/json.md describes it."""
    facts: dict[str, object] = {}
    for name, value in asdict(edit).items():
        if name == "folded" or (name in ("fit", "carried", "unreferenced", "notes") and not value):
            continue
        if name == "backups":
            facts["backup"] = edit.backup
        facts[name] = edit.verb.past if name == "verb" else value
    return facts


def edit_text(edit: EditResult, *, verbose: bool = False) -> str:
    """Return the report: the changed names, the names that also changed, and the bytes written.

    Many names are folded, with how many tensors and bytes they are; with `verbose` each is spelled out.
    """
    verb = f"would {edit.verb.infinitive}" if edit.dry_run else edit.verb.past
    most = len(edit.renamed) if verbose else _MOST
    spell = name_text if verbose else brief_name
    renamed = listed(edit.renamed, most, lambda old: f"{spell(old)} {edit.verb.between} {spell(edit.renamed[old])}")
    named = renamed if edit.renamed else _changed(edit, verbose=verbose) or "it"
    lines = [f"{escaped(edit.path)}: {verb} {named}"]
    if edit.also_changed:
        also = "would also change" if edit.dry_run else "also changed"
        share = "they share" if len(edit.also_changed) > 1 else "it shares"
        lines.append(f"  {_names(edit.also_changed)} {also}: {share} these bytes")
    if edit.remaining:
        lines.append(f"  the bytes stay in the file: {_names(edit.remaining)} still {_refer(edit.remaining)} to them")
    lines += [f"  {_carried(each, dry_run=edit.dry_run)}" for each in edit.carried]
    if edit.removed:
        gone = "would be removed" if edit.dry_run else "removed"
        lines.append(f"  {_names(edit.removed)} {gone}, as nothing is left in it")
    if edit.unreferenced:
        stays = "would stay" if edit.dry_run else "stay"
        lines.append(
            f"  {bytes_text(edit.unreferenced)} that nothing refers to {stays} in its files: "
            f"ckpt compact {quoted(edit.path)} frees them"
        )
    if edit.left:
        lines.append(f"  left as they are: {_names(edit.left)}")
    for place in dict.fromkeys(edit.placed.values()):
        keys = tuple(key for key, where in edit.placed.items() if where == place)
        lines.append(f"  {_names(keys)}: in {place}")
    lines += [f"  {escaped(note)}" for note in edit.notes]
    if edit.fit is not None:
        lines += _fit_lines(edit.fit)
    lines.append(f"  {_written(edit)}")
    if edit.other_names:
        keep = "would keep" if edit.dry_run else "keep" if edit.other_names > 1 else "keeps"
        lines.append(f"  {count_text(edit.other_names, 'other name')} (hard links) {keep} the old file")
    if edit.beside is not None:
        lines += beside_lines(edit.beside, dry_run=edit.dry_run)
    return "\n".join(lines) + "\n"


def undo_text(edit: EditResult) -> str:
    """Describe what `undo` restored: the files, the backups that are then gone, and files that the edit had created."""
    would = "would be " if edit.dry_run else ""
    files = "" if len(edit.changed) == 1 else f"{_names(edit.changed)} "
    lines = [f"{escaped(edit.path)}: {files}{would}restored from {listed(edit.backups, 1, escaped)}"]
    if edit.removed:
        lines.append(f"  {_names(edit.removed)} {would}removed, which the edit had created")
    return "\n".join(lines) + "\n"


def _written(edit: EditResult) -> str:
    """Return the line about the bytes written and their file."""
    written = count_text(edit.bytes_written, "byte")
    old = "the old files are" if len(edit.backups) > 1 else "the old file is"
    kept = f", {old} {listed(edit.backups, 1, escaped)}" if edit.backups else ""
    if not edit.bytes_written and not edit.removed:
        return "it is so already" if edit.dry_run else "it was so already"
    if not edit.bytes_written:
        return f"no other file {'would be' if edit.dry_run else 'was'} written{kept}"
    if edit.in_place and edit.patched:
        return f"{written} would be written in place" if edit.dry_run else f"{written} changed in place{kept}"
    where = "" if edit.in_place else f" to {escaped(edit.output)}"
    if edit.dry_run:
        return f"{written} would be {f'written{where}' if where else 'rewritten'}"
    return f"{f'written{where}' if where else 'rewritten'}, {written}{kept}"


def _changed(edit: EditResult, *, verbose: bool) -> str:
    """Return the changed names; many of them folded, unless all are asked for."""
    if verbose:
        return listed(edit.changed, len(edit.changed), name_text)
    if len(edit.folded) < len(edit.changed):
        return listed(edit.folded, _MOST, _group) if edit.folded else _names(edit.changed)
    return _names(edit.changed)


def _fit_lines(fit: Fit) -> list[str]:
    """Return whether the model would load the result, and the names that still keep it from that."""
    model = escaped(fit.model)
    if fit.loads:
        return [f"  a strict load in place of {model} then works"]
    kinds = (("missing", fit.missing), ("unexpected", fit.unexpected), ("of another size", fit.sizes))
    lines = [f"  {len(names)} {what}: {_names(names)}" for what, names in kinds if names]
    return [f"  a strict load in place of {model} does not work yet:", *lines]


def _group(folded: Folded) -> str:
    """Return folded names with how many tensors and bytes they are: `optimizer_states (19 tensors, 75.0 kB)`."""
    name = brief_name(folded.name)
    if folded.tensors + folded.others == 1:
        return name
    if not folded.tensors:
        return f"{name} ({folded.others:,} entries)"
    return f"{name} ({count_text(folded.tensors, 'tensor')}, {bytes_text(folded.nbytes)})"


_HOW = {"named": "by name", "unique": "by shape", "order": "by order"}
"""How states are known to be those of parameters, in a few words."""


def _carried(carried: Carried, *, dry_run: bool) -> str:
    """Return what became of an optimizer."""
    name = brief_name(carried.optimizer) if carried.optimizer else "the optimizer"
    if carried.action == "dropped":
        return f"{name} {'would be' if dry_run else 'was'} taken out"
    would = "would be " if dry_run else ""
    how = f"{_HOW.get(carried.how or '', '')}{f', {carried.hypothesis}' if carried.hypothesis else ''}"
    states = "the state" if len(carried.parameters) == 1 else "the states"
    return f"{name}: {states} of {_names(carried.parameters)} {would}{carried.action} too (paired {how})"


def _refer(names: tuple[str, ...]) -> str:
    return "refer" if len(names) > 1 else "refers"


def _names(names: tuple[str, ...]) -> str:
    return listed(names, _MOST, brief_name)


_FILES = 5
"""Names of files that are spelled out."""


def beside_lines(beside: Beside | None, *, dry_run: bool) -> list[str]:
    """Return a line for the files that were copied, for those that were not, and for a config that is wrong now."""
    if beside is None:
        return []
    lines = []
    if beside.copied:
        copied = "would be copied" if dry_run else "copied"
        names = [name_text(name) for name in beside.copied]
        lines.append(f"  {count_text(len(names), 'other file')} {copied}: {listed(names, _FILES)}")
    if beside.left:
        left = [f"{name_text(item.name)} ({item.why})" for item in beside.left]
        lines.append(f"  not copied: {listed(left, _FILES)}")
    if beside.stale:
        lines.append(f"  {escaped(beside.stale)}")
    return lines
