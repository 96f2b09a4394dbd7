"""Which tensors of a model an adapter means: by their names, from the model's own names and no table of models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt_cli.errors import RefusedError, listed
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.lora import KOHYA, Adapter, Matched
from ckpt_cli.ops.match_states import model_tensors
from ckpt_cli.ops.select import close_names

_DEEPEST = 64
"""Parts of a name, counted from its end, by which an adapter may name it."""

_COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "model.")
"""Beginnings of names that say which model of a pipeline is meant; the model's own file does not have them."""


def match_names(adapter: Adapter, names: Iterable[str], path: str) -> Matched:
    """Find what an adapter means in a model by the names of its tensors.

    A name is taken as it is, then as the end of one of the model's; kohya's names are the model's with underscores in
    place of dots. Raises RefusedError where several could be meant, and where nothing of the adapter is found.
    """
    known = list(names)
    finder = _Finder(known, adapter, path)
    weights, unmatched = [], []
    for low in adapter.modules:
        name = finder.find(f"{low.module}.weight")
        if name is None:
            unmatched.append(low.module)
        else:
            weights.append((low, name))
    whole: dict[str, Tensor] = {}
    for given, tensor in adapter.whole.items():
        name = finder.find(given)
        if name is None:
            unmatched.append(given)
        else:
            whole[name] = tensor
    copies = {name: tensor for given, tensor in adapter.copies.items() if (name := finder.find(given)) is not None}
    if not weights and not whole:
        first = next((f"{low.module}.weight" for low in adapter.modules), "")
        raise RefusedError(
            "nothing of the adapter is in the model by its names",
            path=adapter.path,
            details=[f"{first}, of the adapter", *(f"{name}, of the model" for name in nearest(first, known))],
        )
    return Matched(weights, whole, copies, unmatched)


def matched_with(adapter: Adapter, model: Checkpoint, path: str) -> Matched:
    """Find what an adapter means in an open model."""
    prefix, tensors = model_tensors(model)
    return match_names(adapter, [tensor.name[len(prefix) :] for tensor in tensors], path)


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return three names that are the most like another one."""
    import difflib

    pool = known[:5_000]
    return close_names(name, pool) or difflib.get_close_matches(name[:200], [each[:200] for each in pool], 3, 0.0)


class _Finder:
    """Finds names of a model."""

    def __init__(self, names: Sequence[str], adapter: Adapter, path: str) -> None:
        self._names = set(names)
        self._path = path
        self._is_kohya = adapter.layout == KOHYA
        wanted = {form for given in self._given(adapter) for form in self._forms(given)}
        self._ends: dict[str, list[str]] = {}
        self._flat: dict[str, list[str]] = {}
        for name in names:
            self._note_ends(name, wanted)
            if self._is_kohya:
                self._flat.setdefault(name.replace(".", "_"), []).append(name)

    @staticmethod
    def _given(adapter: Adapter) -> Iterable[str]:
        yield from (f"{low.module}.weight" for low in adapter.modules)
        yield from adapter.whole
        yield from adapter.copies

    @staticmethod
    def _forms(given: str) -> list[str]:
        """Return a name, and the same without the component of a pipeline that it begins with."""
        return [given, *(given.removeprefix(part) for part in _COMPONENTS if given.startswith(part))]

    def _note_ends(self, name: str, wanted: set[str]) -> None:
        at = len(name)
        for _ in range(_DEEPEST):
            at = name.rfind(".", 0, at)
            if at < 0:
                return
            end = name[at + 1 :]
            if end in wanted:
                self._ends.setdefault(end, []).append(name)

    def find(self, given: str) -> str | None:
        """Return the name that is meant; None where there is none. Raises RefusedError for several."""
        for form in self._forms(given):
            if form in self._names:
                return form
        for form in self._forms(given):
            if form in self._ends:
                return self._only(given, self._ends[form])
        return self._of_kohya(given) if self._is_kohya else None

    def _of_kohya(self, given: str) -> str | None:
        """Return the name whose dots have become underscores, after `lora_` and the name of the model."""
        stem, end = given.removesuffix(".weight"), "_weight"
        flat = stem.replace(".", "_")
        for form in (flat, flat.partition("_")[2], flat.partition("_")[2].partition("_")[2]):
            if form and form + end in self._flat:
                return self._only(given, self._flat[form + end])
        return None

    def _only(self, given: str, found: Sequence[str]) -> str:
        if len(found) > 1:
            raise RefusedError(
                f"{given!r} of the adapter may mean {len(found)} tensors: {listed(found, 3)}",
                path=self._path,
                hint="rename those that are not meant, or merge into the part of the model that is",
            )
        return found[0]
