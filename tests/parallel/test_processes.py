"""Heavy work on processes that share no memory: the same results, and ranges travel instead of bytes."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dcp_formats import save_ranks
from elsewhere import HERE, elsewhere
from torch_files import load

from ckpt_cli.arrays.cast import Losses
from ckpt_cli.arrays.compare import Tolerance
from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.edits.cast import plan_cast
from ckpt_cli.edits.convert import convert
from ckpt_cli.edits.convert_options import ConvertOptions
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.check.run import check
from ckpt_cli.ops.diff import Asked, diff
from ckpt_cli.ops.hash import hash_tensors
from ckpt_cli.ops.series import series
from ckpt_cli.ops.stats import stats
from ckpt_cli.ops.steps import Source


class Counting(Executor):
    """Processes, and the bytes that went to them and came back."""

    def __init__(self, pool: Executor) -> None:
        self.pool = pool
        self.sent = 0
        self.returned = 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Count a job, and its answer once that is there."""
        self.sent += len(pickle.dumps((function, arguments, options)))
        future = self.pool.submit(function, *arguments, **options)
        future.add_done_callback(self._count)
        return future

    def _count(self, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.returned += len(pickle.dumps(future.result()))


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Two processes that were spawned, not forked."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture
def threads() -> Iterator[Executor]:
    """Two threads, whose results are the right ones."""
    with ThreadPoolExecutor(2) as executor:
        yield executor


def contiguous(folder: Path) -> Path:
    """Tensors that stand one after another."""
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(1500, 1024, generator=generator), "b": torch.randn(999, 1000).bfloat16(),
             "i": torch.arange(500_000), "byte": torch.arange(700_000).to(torch.uint8)}  # fmt: skip
    torch.save(state, folder / "contiguous.pt")
    return folder / "contiguous.pt"


def views(folder: Path) -> Path:
    """Transposed, strided and flagged views."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(1500, 1400, generator=generator)
    turned = torch.complex(torch.randn(300, 400), torch.randn(300, 400))
    negative = torch.randn(500, 600)._neg_view()
    state = {"t": wide.t(), "s": torch.randn(3000, 500, generator=generator)[:, ::3], "conj": turned.conj(),
             "neg": negative, "p": torch.randn(7, 300, 301, generator=generator).permute(2, 0, 1),
             "half": wide.t()[:, 3:900].half().t()}  # fmt: skip
    torch.save(state, folder / "views.pt")
    return folder / "views.pt"


def big_endian(folder: Path) -> Path:
    """Arrays of numpy in the other byte order."""
    turned = np.arange(600_000, dtype=">i8").reshape(600, -1).T
    np.savez(folder / "big.npz", a=np.arange(600_000, dtype=">f4"), b=turned)
    return folder / "big.npz"


def compressed(folder: Path) -> Path:
    """Arrays that must be inflated in order, so that their bytes travel."""
    np.savez_compressed(folder / "packed.npz", a=np.arange(600_000, dtype="f4"), b=np.ones((700, 800)).T)
    return folder / "packed.npz"


def quantized(folder: Path) -> Path:
    """Integers with a scale a channel, and packed ones."""
    values, scales = torch.randn(800, 500), torch.rand(800).double() + 0.5
    zeros = torch.zeros(800, dtype=torch.int64)
    state = {"q": torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8),
             "turned": torch.quantize_per_tensor(values, 0.1, 3, torch.quint8).t(),
             "four": torch.quantize_per_channel(values, scales.float(), zeros.float(), 0, torch.quint4x2)}  # fmt: skip
    torch.save(state, folder / "quantized.pt")
    return folder / "quantized.pt"


def sharded(folder: Path) -> Path:
    """A distributed checkpoint of a tensor whose rows are in two files."""
    save_ranks({"0.weight": torch.arange(1_000_000.0).reshape(1000, 1000)}, folder / "sharded")
    return folder / "sharded"


def sharded_by_columns(folder: Path) -> Path:
    """The same of columns, which are in so many pieces that their bytes travel."""
    save_ranks({"2.weight": torch.arange(1_000_000.0).reshape(1000, 1000)}, folder / "columns")
    return folder / "columns"


GATHERED = [compressed, quantized, sharded_by_columns]
"""Files whose bytes are gathered by whoever hands out the jobs."""

FILES = [contiguous, views, big_endian, sharded, *GATHERED]

Question = Callable[[str, Executor], object]


def _source(path: str) -> Source:
    return Source(path, lambda: closing(open_checkpoint(path)))


QUESTIONS: dict[str, Question] = {
    "stats": lambda path, executor: stats(open_checkpoint(path), [], executor, total=True),
    "hash": lambda path, executor: hash_tensors(open_checkpoint(path), "blake3", executor),
    "diff": lambda path, executor: diff(
        open_checkpoint(path), open_checkpoint(path.replace("/a/", "/b/")), Asked(), Tolerance(), executor
    ),
    "series": lambda path, executor: series(
        [Source(each, lambda at=each: closing(open_checkpoint(at))) for each in (path, path.replace("/a/", "/b/"))],
        [],
        executor,
    ),
    "check": check,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantize"),
    pytest.mark.filterwarnings("ignore:.*Quantized"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("build", FILES, ids=lambda build: build.__name__)
def test_processes_answer_what_threads_do(
    build: Callable[[Path], Path], question: str, tmp_path: Path, pool: Executor, threads: Executor
) -> None:
    paths = []
    for number, side in enumerate(("a", "b")):
        torch.manual_seed(number)
        (tmp_path / side).mkdir()
        paths.append(build(tmp_path / side))
    path, ask = str(paths[0]), QUESTIONS[question]
    counting = Counting(pool)
    assert repr(ask(path, counting)) == repr(ask(path, threads))
    if build not in GATHERED:
        asked = paths if question in ("diff", "series") else paths[:1]
        nbytes = sum(file.stat().st_size for path in asked for file in (path.rglob("*") if path.is_dir() else [path]))
        assert counting.sent + counting.returned < nbytes / 100


def test_the_hash_of_views_is_that_of_contiguous_copies(tmp_path: Path, pool: Executor) -> None:
    path = views(tmp_path)
    plain = {name: tensor.resolve_conj().resolve_neg().contiguous() for name, tensor in load(path).items()}
    torch.save(plain, tmp_path / "plain.pt")
    found = [hash_tensors(open_checkpoint(str(each)), "sha256", pool) for each in (path, tmp_path / "plain.pt")]
    assert found[0] == found[1]


@pytest.mark.parametrize("build", [contiguous, views], ids=lambda build: build.__name__)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_convert_casts_on_processes(build: Callable[[Path], Path], suffix: str, tmp_path: Path, pool: Executor) -> None:
    path = build(tmp_path)
    state = {name: tensor for name, tensor in load(path).items() if not tensor.is_complex()}
    torch.save(state, path)
    counting = Counting(pool)
    options = ConvertOptions(dtype=BY_NAME["float16"], lossy=True, shared="clone", executor=counting)
    convert(str(path), str(tmp_path / f"new.{suffix}"), options)
    made = open_checkpoint(str(tmp_path / f"new.{suffix}"))
    for tensor in made.tensors:
        old = state[tensor.name]
        wanted = old.half() if old.is_floating_point() else old
        assert np.array_equal(values_of(made, tensor), wanted.numpy())
    assert 0 < counting.sent < path.stat().st_size / 100


def test_cast_runs_on_processes(tmp_path: Path, pool: Executor) -> None:
    path = contiguous(tmp_path)
    before, counting, losses = load(path), Counting(pool), Losses()
    checkpoint = open_checkpoint(str(path))
    planned = plan_cast(checkpoint, BY_NAME["bfloat16"], ["a"], losses=losses, executor=counting)
    (content,) = planned.changes.contents.values()
    assert content.make is not None
    pieces: list[bytes] = []
    content.make(lambda piece: pieces.append(bytes(piece)))
    made = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.bfloat16)
    assert torch.equal(made, before["a"].bfloat16().reshape(-1))
    assert 0 < counting.sent < before["a"].nbytes / 100


def test_processes_read_a_checkpoint_elsewhere_for_themselves(
    tmp_path: Path, pool: Executor, threads: Executor
) -> None:
    for path in (contiguous(tmp_path), sharded(tmp_path)):
        with elsewhere(tmp_path):
            near, far = open_checkpoint(str(path)), open_checkpoint(f"{HERE}{path.name}")
            counting = Counting(pool)
            found = hash_tensors(far, "sha256", counting)
        assert found.tensors == hash_tensors(near, "sha256", threads).tensors
        assert counting.sent < sum(file.size for file in near.container.files) / 4
        for checkpoint in (near, far):
            checkpoint.close()
