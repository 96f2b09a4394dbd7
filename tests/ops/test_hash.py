"""`ckpt hash`: one content, one hash, whatever holds it; and anybody can compute it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from builders import pt
from builders.pickles import tensor
from conftest import Ckpt
from safetensors.torch import save_file

import ckpt_cli
from ckpt_cli.ops import hash as hashing

DEFINITION = Path(ckpt_cli.__file__).parent.parent / "docs" / "hash.md"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*quantize",
    "ignore:.*ComplexHalf",
    "ignore:.*Quantized",
    "ignore:.*beta",
    "ignore:torch.distributed is disabled",
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int16,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def hashes_of(ckpt: Ckpt, path: Path, *options: object) -> dict[str, str]:
    done = ckpt("hash", path, "--json", *options)
    assert done.code == 0, done.err
    found: dict[str, str] = json.loads(done.out)["tensors"]
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The functions of the listing in docs/hash.md."""
    blocks = re.findall(r"```python\n(.*?)```", DEFINITION.read_text(encoding="utf-8"), re.DOTALL)
    (listing,) = [block for block in blocks if "def tensor_hash" in block]
    assert len(listing.strip().splitlines()) <= 18
    names: dict[str, Any] = {}
    exec(listing, names)
    return names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_documentation_says_how_to_compute_it(
    dtype: torch.dtype, reference: dict[str, Any], tmp_path: Path, ckpt: Ckpt
) -> None:
    data = np.random.default_rng(0).integers(0, 2 if dtype == torch.bool else 256, 9_000_000 // 16 * 16, "u1")
    values = torch.from_numpy(data).view(dtype)
    state = {"big": values[: values.numel() // 3 * 3].reshape(3, -1), "scalar": values[5], "empty": values[:0]}
    torch.save(state, tmp_path / "m.pt")
    done = json.loads(ckpt("hash", tmp_path / "m.pt", "--json").out)
    assert done["tensors"] == {name: reference["tensor_hash"](kept) for name, kept in state.items()}
    assert done["checkpoint"] == reference["checkpoint_hash"](state)
    assert done["algorithm"] == "blake3"


def test_sha256_is_the_same_sum_with_another_function(reference: dict[str, Any], tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"w": torch.arange(2_000_000.0)}
    torch.save(state, tmp_path / "m.pt")
    found = hashes_of(ckpt, tmp_path / "m.pt", "--algorithm", "sha256")
    assert found["w"] == reference["tensor_hash"](state["w"], hashlib.sha256)


def test_formats_order_strides_and_ties_do_not_matter(tmp_path: Path, ckpt: Ckpt) -> None:
    base = torch.arange(3_000_000.0).reshape(1500, 2000)
    views = {"t": base.t(), "cut": base[::3, 5:900:7], "row": torch.ones(1, 3).expand(5, 3), "tied": base.t()}
    plain = {name: view.contiguous().clone() for name, view in reversed(views.items())}
    torch.save(views, tmp_path / "views.pt")
    torch.save(plain, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(plain, tmp_path / "m.safetensors")
    np.savez_compressed(tmp_path / "m.npz", **{name: view.numpy() for name, view in plain.items()})
    np.savez(tmp_path / "big.npz", **{name: view.numpy().astype(">f4") for name, view in views.items()})
    (tmp_path / "set").mkdir()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"t": plain["t"]}, tmp_path / "set" / first)
    save_file({name: plain[name] for name in ("cut", "row", "tied")}, tmp_path / "set" / second)
    index = {"weight_map": {name: first if name == "t" else second for name in plain}, "metadata": {}}
    (tmp_path / "set" / "model.safetensors.index.json").write_text(json.dumps(index))
    paths = ["views.pt", "legacy.pt", "m.safetensors", "m.npz", "big.npz", "set"]
    found = [json.loads(ckpt("hash", tmp_path / path, "--json").out) for path in paths]
    assert all(one == found[0] for one in found)


def test_flagged_views_hash_as_their_values(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.tensor([1 + 2j, -3j])
    torch.save(
        {"conj": values.conj(), "neg": values.clone().conj().imag, "bits": torch.tensor([0.0])}, tmp_path / "a.pt"
    )
    resolved = {"conj": values.conj().resolve_conj(), "neg": values.conj().imag.clone().resolve_neg()}
    torch.save({**resolved, "bits": torch.tensor([-0.0])}, tmp_path / "b.pt")
    a, b = hashes_of(ckpt, tmp_path / "a.pt"), hashes_of(ckpt, tmp_path / "b.pt")
    assert (a["conj"], a["neg"]) == (b["conj"], b["neg"])
    assert a["bits"] != b["bits"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_negated_view_keeps_the_bits_of_nan(dtype: torch.dtype, tmp_path: Path, ckpt: Ckpt) -> None:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.from_numpy(np.random.default_rng(7).integers(0, 256, 40_000, "u1")).view(whole)
    torch.save({"w": torch._neg_view(bits.view(dtype))}, tmp_path / "view.pt")
    torch.save({"w": (bits ^ torch.iinfo(whole).min).view(dtype)}, tmp_path / "plain.pt")
    view, plain = (ckpt("hash", tmp_path / name) for name in ("view.pt", "plain.pt"))
    assert view.out == plain.out


def test_one_bit_a_shape_and_a_dtype_each_make_another_hash(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.arange(3_000_000, dtype=torch.int32)
    last = values.clone()
    last[-1] += 1
    nan = torch.tensor([math.nan])
    other = nan.clone().view(torch.int32).add(1).view(torch.float32)
    state = {
        "a": values, "b": last, "c": values.reshape(3, -1), "d": values.clone().view(torch.float32),
        "e": nan, "f": other,
    }  # fmt: skip
    torch.save(state, tmp_path / "m.pt")
    assert len(set(hashes_of(ckpt, tmp_path / "m.pt").values())) == len(state)


def test_what_is_no_plain_array_has_a_hash_of_its_content(tmp_path: Path, ckpt: Ckpt) -> None:
    def state(scale: float, value: float) -> dict[str, torch.Tensor]:
        dense = torch.eye(3) * value
        scales = torch.tensor([scale, 1, 1]).double()
        return {
            "q": torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.quint8).clone().t(),
            "channels": torch.quantize_per_channel(dense, scales, torch.zeros(3), 0, torch.quint4x2),
            "coo": dense.to_sparse(),
            "csr": dense.to_sparse_csr(),
            "meta": torch.empty(2, device="meta"),
        }

    for name, (scale, value) in {"a": (0.5, 1.0), "b": (0.5, 1.0), "c": (0.25, 2.0)}.items():
        torch.save(state(scale, value), tmp_path / f"{name}.pt")
    a, b, c = (hashes_of(ckpt, tmp_path / f"{name}.pt") for name in "abc")
    assert a == b
    assert {name for name in a if a[name] == c[name]} == {"meta"}


def test_any_number_of_workers_gives_the_same(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({f"w{i}": torch.randn(900, 3001)[:, :: 1 + i % 2] for i in range(4)}, tmp_path / "m.pt")
    assert len({ckpt("hash", tmp_path / "m.pt", "--json", "-j", jobs).out for jobs in (1, 2, 7)}) == 1


def test_a_manifest_is_verified(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3), "c": torch.zeros(1)}, tmp_path / "old.pt")
    torch.save({"a": torch.ones(2), "b": torch.zeros(3), "d": torch.zeros(1)}, tmp_path / "new.pt")
    (tmp_path / "m.json").write_text(ckpt("hash", tmp_path / "old.pt", "--json", "--algorithm", "sha256").out)
    good = ckpt("hash", tmp_path / "old.pt", "--verify", tmp_path / "m.json")
    assert (good.code, good.out) == (0, "")
    bad = ckpt("hash", tmp_path / "new.pt", "--verify", tmp_path / "m.json")
    assert (bad.code, bad.lines) == (1, ["differs\tb", "missing\tc", "new\td"])
    told = json.loads(ckpt("hash", tmp_path / "new.pt", "--verify", tmp_path / "m.json", "--json").out)
    assert (told["ok"], told["differ"], told["missing"], told["new"]) == (False, ["b"], ["c"], ["d"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"algorithm": "md5", "tensors": {}}', "[" * 100_000,
                                  '{"algorithm": "blake3", "tensors": {"a": 1}}'])  # fmt: skip
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.pt")
    (tmp_path / "m.json").write_text(text)
    done = ckpt("hash", tmp_path / "m.pt", "--verify", tmp_path / "m.json")
    assert done.code == 2
    assert "not a manifest" in done.err


def test_views_that_repeat_few_bytes_without_end_are_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    pt.write(tmp_path / "m.pt", {"w": tensor("0", (1 << 40,), stride=(0,), numel=4)}, {"0": bytes(16)})
    assert ckpt("hash", tmp_path / "m.pt").code == 2


def test_the_size_of_pieces_never_changes() -> None:
    assert hashing.PIECE == 4 * 1024 * 1024


def test_distributed_checkpoints_and_plain_ones_are_one_to_every_command(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"w": torch.randn(700, 1001), "b": torch.arange(10)}
    torch.save(state, tmp_path / "m.pt")
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for command in ("hash", "stats"):
        answers = {ckpt(command, tmp_path / path, "--json").out for path in ("m.pt", "dcp")}
        assert len(answers) == 1
    assert ckpt("diff", tmp_path / "m.pt", tmp_path / "dcp").code == 0
    torch.save({**state, "w": -state["w"]}, tmp_path / "other.pt")
    (change,) = json.loads(ckpt("diff", tmp_path / "dcp", tmp_path / "other.pt", "--json").out)["changed"]
    assert change["max_abs"] == (2 * state["w"].abs().max()).item()
