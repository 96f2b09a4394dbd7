"""What libraries write passes `ckpt check` without a finding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check_cases.case import codes, deep_check, hub, saved
from contract import FORMATS, Format
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_model

from ckpt_cli.ops.check.run import check


@pytest.mark.parametrize("each", FORMATS, ids=lambda each: each.label)
def test_what_every_writer_writes_is_clean(each: Format, tmp_path: Path) -> None:
    path = tmp_path / f"m{each.suffix}"
    each.put(path)
    allowed = {"total-size"} if path.is_dir() else set()  # which the sample's own index has as 1
    assert codes(deep_check(path), "error", "warning") <= allowed


def test_a_folder_of_the_hub_is_clean_without_a_note(tmp_path: Path) -> None:
    state = {f"l{n}.weight": torch.randn(8, 8) for n in range(4)}
    state["tied.weight"] = state["l0.weight"]
    report = deep_check(hub(tmp_path, state))
    assert report.findings == []
    assert (report.files, report.tensors) == (3, 4)  # the tied name is not written


def test_a_folder_of_the_hub_in_pickles_is_clean(tmp_path: Path) -> None:
    state = {f"l{n}.weight": torch.randn(8, 8) for n in range(4)}
    save_torch_state_dict(state, tmp_path, max_shard_size=512, safe_serialization=False)
    assert deep_check(tmp_path).findings == []


@pytest.mark.parametrize(
    "state",
    [
        {
            "big": torch.randn(100),
            "t": torch.arange(6.0).reshape(2, 3).t(),
            "e": torch.zeros(0, 3),
            "n": torch.tensor(1),
        },
        {"s": torch.eye(3).to_sparse()},
        {"m": torch.empty(2, device="meta"), "row": torch.ones(1, 3).expand(2, 3)},
        {"f8": torch.randn(4, 4).to(torch.float8_e4m3fn), "c": torch.randn(3, dtype=torch.complex64).conj()},
    ],
    ids=["plain", "layouts", "meta", "dtypes"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_torch_saves_is_clean(state: dict[str, torch.Tensor], legacy: bool, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    report = deep_check(tmp_path / "m.pt")
    assert report.ok
    assert not codes(report) - {"constant", "misaligned"}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*TypedStorage is deprecated")
def test_a_quantized_tensor_is_clean(tmp_path: Path) -> None:
    made_ = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8)
    assert deep_check(saved(tmp_path, {"q": made_})).findings == []


def test_a_quantized_view_with_gaps_is_looked_into_without_a_note(tmp_path: Path) -> None:
    whole = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 3, torch.qint8)
    assert deep_check(saved(tmp_path, {"rows": whole[::2], "columns": whole[:, 1:3]})).findings == []


def test_a_training_checkpoint_and_its_own_classes_are_clean(work: Path) -> None:
    for name in ("train.pt", "mlp.pt", "tied.pt", "mlp.safetensors"):
        assert not codes(deep_check(work / name), "error", "warning"), name


@pytest.mark.parametrize("alignment", [64, 4096])
def test_the_layout_of_torch_is_known_at_every_size_and_alignment(tmp_path: Path, alignment: int) -> None:
    from torch.utils.serialization import config

    sizes = [0, 1, 3, 15, 16, 17, 40, 0, 1000, 5]
    before = config.save.storage_alignment
    config.save.storage_alignment = alignment
    try:
        path = saved(tmp_path, {f"{n}" * (n + 1): torch.ones(size) for n, size in enumerate(sizes)})
    finally:
        config.save.storage_alignment = before
    assert check(str(path)).findings == []


def test_the_layout_is_what_torch_computes_beyond_4_gib(tmp_path: Path) -> None:
    from torch._C import PyTorchFileReader

    from ckpt_cli.formats.zip.layout import computed_offsets

    reader = PyTorchFileReader(str(saved(tmp_path)))
    full = 0xFFFFFFFF
    for header in (100, full - 64, full, full + 63):
        for nbytes in (0, 5, full - 1, full, full + 9):
            storages = [("m/data/0", 0), ("m/data/1", nbytes), ("m/data/2", 3)]
            _, (_, second), (_, third) = computed_offsets(header, header, storages, 64)
            assert second == reader.get_record_offset_no_read(header, "data/1", nbytes, 64)
            after = second + nbytes + (0 if not nbytes else 24 if header >= full or nbytes >= full else 16)
            assert third == reader.get_record_offset_no_read(after, "data/2", 3, 64)


def test_save_model_is_clean_but_for_the_format(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    save_model(net, str(tmp_path / "m.safetensors"))
    assert codes(deep_check(tmp_path / "m.safetensors")) <= {"no-format"}
