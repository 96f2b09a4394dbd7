"""The checkpoints of a run, the steps at which they were written, and their order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import field

from ckpt_cli.errors import CkptError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.places import canonical, exists, is_folder, join, matching, names_in
from ckpt_cli.files.system import allow_open_files
from ckpt_cli.formats.registry import folder_kind
from ckpt_cli.formats.runs.names import is_step, natural, steps_in
from ckpt_cli.formats.sharded.names import SUFFIXES, several_in
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Tensor, Value
from ckpt_cli.ops.hf_config import config_beside

Number = int | float

_KEYS = {
    "step": (
        "global_step", "step", "global_steps", "iteration", "iter", "num_updates", "n_iter",
        "optimizer_history.0.num_updates", "extra_state.train_iterator.num_updates", "trainer.global_step",
    ),
    "epoch": ("epoch", "last_epoch", "current_epoch", "extra_state.train_iterator.epoch", "extra_state.epoch"),
}  # fmt: skip
"""Names of entries, or keys of the metadata, that say the step and the epoch: Lightning, DeepSpeed, fairseq, YOLO and
scripts. The first that is there counts."""

_FOLDER = re.compile(r"(?:^|[/\\])(?:checkpoint-|global_step)(\d{1,18})(?=$|[/\\])")
"""The folders of Hugging Face's Trainer and of DeepSpeed."""


_CHECKPOINTS, _FILES, _ENTRIES = 64, 256, 24_000
"""Checkpoints that are open at a time, their files, and their entries: at most, but at least two checkpoints. The last
ones are read again beside the next ones."""

OnError = Callable[[str, CkptError | OSError], None]
"""Called with the path of a checkpoint that cannot be opened, and the error; what it raises ends the run."""


def raised(path: str, error: CkptError | OSError) -> None:  # noqa: ARG001
    """Raise an error."""
    raise error


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is opened when its turn comes, and perhaps again later."""

    path: str
    open: Callable[[], AbstractContextManager[Checkpoint]]


@dataclass(frozen=True, slots=True)
class Member:
    """What is known of one checkpoint of a run while it is not open."""

    source: Source
    path: str
    """The path of the file that its source leads to."""
    numbers: Mapping[str, Number]
    """The `step` and the `epoch`, where it says them."""
    files: int
    entries: int


@dataclass(slots=True)
class Run:
    """The checkpoints of a run that can be opened, in the order of their steps."""

    members: Sequence[Member]
    by: str
    """What they are ordered by: `step` or `epoch`, if all of them say it and that decides; else `name`."""
    most_files: int
    _open: Sequence[Checkpoint] = field(default=())

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of members that are open at a time: each begins with the last one of the range before."""
        begin, end = 0, len(self.members)
        while begin < end - 1 or begin == 0 < end:
            stop = begin + 1
            while stop < end and (stop < begin + 2 or _few(self.members[begin : stop + 1], self.most_files)):
                stop += 1
            yield begin, stop
            begin = stop - 1 if stop < end else end

    @contextmanager
    def opened(self, begin: int, end: int) -> Iterator[list[Checkpoint | CkptError | OSError]]:
        """Context manager: some of them, or the error where a checkpoint cannot be opened any more."""
        with ExitStack() as stack:
            found: list[Checkpoint | CkptError | OSError] = list(self._open)
            if not self._open:
                found += [_opened(member.source, stack) for member in self.members[begin:end]]
            yield found


@contextmanager
def run_of(sources: Iterable[Source], look: Callable[[Checkpoint], None], on_error: OnError) -> Iterator[Run]:
    """Context manager: open each checkpoint of a run once, `look` at it, and order them by what they say.

    Of a few, all stay open until the end; else none does.
    """
    most_files = allow_open_files(_FILES)
    members: list[Member] = []
    held: list[Checkpoint] = []
    with ExitStack() as stack:
        for source in sources:
            with ExitStack() as one:
                checkpoint = _opened(source, one)
                if not isinstance(checkpoint, Checkpoint):
                    on_error(source.path, checkpoint)
                    continue
                look(checkpoint)
                files, entries = len(checkpoint.container.files), len(checkpoint.entries)
                members.append(Member(source, checkpoint.path, _numbers_of(checkpoint), files, entries))
                if len(held) == len(members) - 1 and _few(members, most_files):
                    held.append(checkpoint)
                    stack.push(one.pop_all())
            if len(held) < len(members):
                held.clear()
                stack.close()
        order, by = _ordered(members)
        yield Run([members[number] for number in order], by, most_files, [held[number] for number in order if held])


class Progress:
    """The bytes that were read and those of the whole run, which are estimated where it is read part by part."""

    def __init__(self, on_progress: OnProgress, files: int) -> None:
        self._on_progress = on_progress
        self._files = files
        self._before = 0

    def part(self, end: int) -> OnProgress:
        """Return what is called with the bytes of the next part, which ends before checkpoint `end`."""
        before = self._before

        def on_progress(done: int, total: int) -> None:
            self._before = before + total
            self._on_progress(before + done, self._before * self._files // end)

        return on_progress


def _opened(source: Source, stack: ExitStack) -> Checkpoint | CkptError | OSError:
    """Open a checkpoint until the stack is closed, or return the error."""
    try:
        return stack.enter_context(source.open())
    except (CkptError, OSError) as error:
        return error


def _few(members: Sequence[Member], most_files: int) -> bool:
    """True if some checkpoints may be open together."""
    return (
        len(members) <= _CHECKPOINTS
        and sum(member.files for member in members) <= most_files
        and (len(members) <= 2 or sum(member.entries for member in members) <= _ENTRIES)
    )


def checkpoints_at(path: str, is_there: Callable[[str], bool] = exists) -> list[str]:
    """Return the checkpoints that a path stands for: those in the folder of a run or that a glob matches, else itself.

    The folder of a run has folders such as `checkpoint-500` or, if it is not one checkpoint, several files of them.
    `is_there` says whether a path exists. Raises OSError for a folder that cannot be listed.
    """
    if not is_there(path):
        return [found for each in matching(path) for found in checkpoints_at(each)] or [path]
    if not is_folder(path):
        return [path]
    names = names_in(path)
    if folder_kind(path, names) is not None:
        return [path]
    steps = [name for name in names if is_step(name) and is_folder(join(path, name))]
    return [join(path, name) for name in steps or several_in(names)] or [path]


def checkpoints_within(path: str) -> list[str]:
    """Return the checkpoints in the folder of a run, in natural order; none of a folder that is a checkpoint itself.

    Raises OSError for a folder that cannot be listed.
    """
    if not is_folder(path):
        return []
    names = names_in(path)
    if any(name.endswith((*SUFFIXES, ".index.json")) for name in names) or folder_kind(path, names) is not None:
        return []
    return [join(path, name) for name in steps_in(path, names)]


def _ordered(members: Sequence[Member]) -> tuple[list[int], str]:
    """Return the numbers of checkpoints by their steps, else epochs, else names in natural order, and which it is."""
    shared = [key for key in _KEYS if all(key in member.numbers for member in members)]
    by = next((key for key in shared if len({member.numbers[key] for member in members}) > 1), "name")

    def key(place: int) -> tuple[object, ...]:
        return (*(members[place].numbers[name] for name in shared), natural(members[place].path))

    return sorted(range(len(members)), key=key), by


def _numbers_of(checkpoint: Checkpoint) -> dict[str, Number]:
    found: dict[str, Number] = {}
    wanted = {name: key for key, names in _KEYS.items() for name in names}
    entries = {entry.name: entry for entry in checkpoint.entries if entry.name in wanted}
    for key, names in _KEYS.items():
        said: Iterable[object] = (_said(checkpoint, entries.get(name), name) for name in names)
        number = next((number for value in said if (number := _number(value)) is not None), None)
        if number is not None:
            found[key] = number
    for key, number in _beside(checkpoint.path).items():
        found.setdefault(key, number)
    return found


def _said(checkpoint: Checkpoint, entry: Value | Tensor | None, name: str) -> object:
    """Return what an entry or a key of the metadata says; None if there is neither."""
    if isinstance(entry, Value):
        return entry.value
    if entry is None:
        return checkpoint.metadata.get(name)
    if entry.numel != 1 or entry.storage is None:
        return None
    from ckpt_cli.arrays.quantized import values_of

    try:
        return values_of(checkpoint, entry).reshape(-1)[0].item()
    except (CkptError, OSError):
        return None


def _number(value: object) -> Number | None:
    """Return a number, also of text; None of what is not a finite number."""
    if isinstance(value, Opaque):  # a numpy scalar: np.int64(3)
        value = re.sub(r"^(?:np|numpy)\.\w+\((.*)\)$", r"\1", value.text)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}(\.\d{1,18})?", value.strip()):
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 2**63 else None


def _beside(path: str) -> dict[str, Number]:
    """Return what the folder of a checkpoint says: by the Trainer's state in it, else by its name."""
    found: dict[str, Number] = {}
    state = config_beside(path, "trainer_state.json") or {}
    for key, name in (("step", "global_step"), ("epoch", "epoch")):
        number = _number(state.get(name))
        if number is not None:
            found[key] = number
    if "step" not in found:
        named = _FOLDER.findall(canonical(path))
        if named:
            found["step"] = int(named[-1])
    return found
