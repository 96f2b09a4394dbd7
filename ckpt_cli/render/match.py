"""The verdict of `match` and the renamings that would mend it, as text and JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ckpt_cli.errors import some_of
from ckpt_cli.ops.match import command_of
from ckpt_cli.render.screen import paint
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import count_text, escaped, name_text, shape_text

if TYPE_CHECKING:
    from ckpt_cli.ops.match import Difference, Match
    from ckpt_cli.ops.match_cures import Cure

_COLUMNS = (Column("what"), Column("name"), Column("a"), Column("b"))

_MOST = 20
"""Names or sizes that a terminal shows; other layouts have all."""


def to_json(found: Match) -> dict[str, object]:
    """Return the verdict as docs/json.md describes it."""
    verdict = found.verdict
    return {
        "a": found.a.path,
        "b": found.b.path,
        "a_prefix": found.a.prefix,
        "b_prefix": found.b.prefix,
        "loads": found.loads,
        "missing": list(verdict.missing),
        "unexpected": list(verdict.unexpected),
        "sizes": list(map(_difference, verdict.sizes)),
        "errors": list(verdict.errors),
        "dtypes": list(map(_difference, verdict.dtypes)),
        "cures": [_cure(found, cure) for cure in found.cures],
    }


def _difference(difference: Difference) -> dict[str, object]:
    return {"name": difference.name, "a": difference.a, "b": difference.b}


def _cure(found: Match, cure: Cure) -> dict[str, object]:
    missing, unexpected, sizes = cure.left
    return {
        "command": shlex.join(command_of(found, cure)),
        "mends": cure.mends,
        "guess": cure.guess,
        "equal": cure.equal,
        "loads": cure.loads,
        "left": {"missing": missing, "unexpected": unexpected, "sizes": sizes},
        "renamed": {found.a.full(old): found.a.full(new) for old, new in cure.names.items()},
    }


def match_text(found: Match, style: str) -> Iterator[str]:
    """Yield the verdict: torch's own words on a terminal, else a row for each name and each renaming."""
    if style == "table":
        return iter([line + "\n" for line in _lines(found)])
    rows = list(_rows(found))
    return table_text(_COLUMNS, rows, style) if rows else iter(())


def _rows(found: Match) -> Iterator[list[str]]:
    verdict, a, b = found.verdict, found.a.leaves, found.b.leaves
    for name in verdict.missing:
        yield ["missing", name_text(name), "", "" if b[name].is_value else shape_text(b[name].shape)]
    for name in verdict.unexpected:
        yield [
            "unexpected",
            name_text(name),
            shape_text(a[name].shape) if name in a and not a[name].is_value else "",
            "",
        ]
    for size in verdict.sizes:
        yield ["size", name_text(size.name), *(shape_text(side) for side in (size.a, size.b))]  # type: ignore[arg-type]  # lists of a shape
    for error in verdict.errors:
        yield ["error", escaped(error), "", ""]
    for dtype in verdict.dtypes:
        yield ["dtype", name_text(dtype.name), str(dtype.a), str(dtype.b)]
    for cure in found.cures:
        what = "guess" if cure.guess else "rename"
        yield [what, _command(found, cure), str(cure.mends), "loads" if cure.loads else "does not load"]


def _command(found: Match, cure: Cure) -> str:
    return escaped(shlex.join(command_of(found, cure)))


def _lines(found: Match) -> Iterator[str]:
    """Yield the lines for a terminal."""
    verdict = found.verdict
    sides = [
        f"{escaped(side.path)}{f' ({name_text(side.prefix)})' if side.prefix else ''}" for side in (found.a, found.b)
    ]
    if found.loads:
        count = count_text(len(found.a.leaves), "name")
        yield f"{paint('load_state_dict would take', 'ok')} {sides[0]} in place of {sides[1]}: {count}"
    else:
        yield f"{paint('Error(s) in loading state_dict', 'error')} of {sides[0]} in place of {sides[1]}:"
    for what, names, colour in (
        ("Missing", verdict.missing, "less"),
        ("Unexpected", verdict.unexpected, "more"),
    ):
        if names:
            quoted = [f'"{name_text(name)}"' for name in names[:_MOST]]
            more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
            yield f"  {paint(f'{what} key(s)', colour)} in state_dict: {', '.join(quoted)}{more}."
    yield from some_of([_size(size) for size in verdict.sizes], _MOST)
    yield from some_of([f"  {escaped(error)}" for error in verdict.errors], _MOST)
    yield from some_of(
        [f"  dtype of {name_text(d.name)}: {d.a} is cast to {d.b}" for d in verdict.dtypes], _MOST
    )  # fmt: skip
    yield from _cure_lines(found)


def _size(size: Difference) -> str:
    shapes = [f"torch.Size({side})" for side in (size.a, size.b)]
    return (
        f"  {paint('size mismatch', 'changed')} for {name_text(size.name)}: copying a param with shape {shapes[0]} "
        f"from checkpoint, the shape in current model is {shapes[1]}."
    )


def _cure_lines(found: Match) -> Iterator[str]:
    cures: Sequence[Cure] = found.cures
    if cures and cures[0].equal:
        yield f"{len(cures)} renamings are equally good:"
    for cure in cures:
        guess = "a guess, by order, place and shape: " if cure.guess else ""
        missing, unexpected, sizes = cure.left
        counts = ((missing, "missing"), (unexpected, "unexpected"), (sizes, "of another size"))
        left = ", ".join(f"{count} {what}" for count, what in counts if count)
        after = (
            f"then a strict load {paint('works', 'ok')}"
            if cure.loads
            else f"then {left or 'other errors'} {'are' if left else 'is'} left"
        )
        yield f"{guess}a renaming mends {count_text(cure.mends, 'name')}; {after}:"
        yield f"  {_command(found, cure)}"
