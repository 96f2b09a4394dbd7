"""The files that the golden cases speak of, beside copies of the sample checkpoints."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from builders import old
from builders.pickles import call
from builders.pt import write
from conftest import SAMPLES
from safetensors.torch import save_file


def build(folder: Path) -> None:
    """Write every input into a folder."""
    for sample in SAMPLES.iterdir():
        if sample.suffix in (".pt", ".safetensors"):
            shutil.copy(sample, folder)
    for sample in (Path(__file__).parent.parent / "samples").glob("*.pt*"):
        shutil.copy(sample, folder)
    samples = Path(__file__).parent.parent / "samples"
    shutil.copytree(samples / "lora" / "linear", folder / "lora")
    steps = '[[step]]\nremove = ["0.bias"]\n[[step]]\nrename = ["0=first"]\n'
    (folder / "recipe.toml").write_text(f"version = 1\n{steps}")
    shutil.copytree(samples / "quantized" / "gptq-4", folder / "gptq")
    (folder / "gptq" / "expected.safetensors").unlink()
    _write_what_is_no_checkpoint(folder)
    torch.save(_kinds(), folder / "kinds.pt")
    with warnings.catch_warnings():  # of layouts that torch calls a prototype
        warnings.simplefilter("ignore")
        torch.save(_layouts(), folder / "layouts.pt")
    torch.save(_layers(), folder / "layers.pt")
    torch.save(_shared(), folder / "shared.pt")
    torch.save({"x": torch.arange(2000.0).reshape(2, 1000)}, folder / "long.pt")
    torch.save({}, folder / "nothing.pt")
    torch.save(_network(), folder / "network.pt")
    torch.save(_oddly_named(), folder / "odd.pt")
    save_file({"a": torch.zeros(2)}, folder / "noted.safetensors", metadata={"licence": "MIT\x1b[31m"})
    write(folder / "evil.pt", {"w": call("os.system", "echo hi"), "net": call("lab.Net")})
    _write_old_formats(folder)
    _write_broken_set(folder / "broken-set")
    _write_stale_set(folder / "stale-set")
    np.save(folder / "row.npy", np.arange(4, dtype=np.float32))


def _write_old_formats(folder: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    with (folder / "two.pt").open("wb") as file:
        for epoch in range(2):
            torch.save({"w": weight + epoch, "epoch": epoch}, file, _use_new_zipfile_serialization=False)
    whole, part = old.TarTensor(9, 5, "Float", (2, 2), (2, 1)), old.TarTensor(10, 6, "Float", (2,), (1,))
    storage = old.TarStorage(5, "Float", np.arange(4, dtype="<f4").tobytes(), location="cuda:0")
    root = {"a": old.numbered(9), "b": old.numbered(10)}
    (folder / "tar.pt").write_bytes(old.tar(root, [storage], [whole, part], [(6, 5, 2, 2)]))
    mixed = {"w": weight, "a": np.asfortranarray(weight.numpy()), "lr": np.float32(0.5), "names": np.array(["x", "y"])}
    for protocol in (2, 4):
        (folder / f"mixed{protocol}.pkl").write_bytes(pickle.dumps(mixed, protocol))
    np.savez(folder / "arrays.npz", a=np.arange(4), b=np.ones((2, 2), ">f4", order="F"))
    np.savez_compressed(folder / "packed.npz", a=np.arange(4))
    (folder / "model.pt.gz").write_bytes(gzip.compress((folder / "mlp.pt").read_bytes(), mtime=0))


def _write_what_is_no_checkpoint(folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "empty.pt").touch()
    (folder / "notes.pt").write_text("remember the milk\n")
    (folder / "page.pt").write_text("<!DOCTYPE html>\n<html><body>404</body></html>\n")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    (folder / "cut.pt").write_bytes((folder / "mlp.pt").read_bytes()[:1500])
    (folder / "cut.safetensors").write_bytes((folder / "mlp.safetensors").read_bytes()[:400])


def _write_broken_set(folder: Path) -> None:
    """Two shards, one of them missing, whose index and config say otherwise."""
    folder.mkdir()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    state = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    save_file(state, folder / first, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 64}, "weight_map": {"lm_head.weight": first, "ghost": first, "lost": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"vocab_size": 5, "hidden_size": 2, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def _write_stale_set(folder: Path) -> None:
    """Two shards, and the index of an earlier save with three."""
    folder.mkdir()
    for number, name in enumerate("ab", 1):
        save_file({name: torch.ones(2)}, folder / f"model-{number:05}-of-00002.safetensors", metadata={"format": "pt"})
    places = {name: f"model-{number:05}-of-00003.safetensors" for number, name in enumerate("abc", 1)}
    index = {"metadata": {"total_size": 24, "note": "kept"}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _kinds() -> dict[str, object]:
    """One tensor of many a dtype and layout."""
    inf, nan = float("inf"), float("nan")
    return {
        "f64": torch.tensor([0.1, -2.5], dtype=torch.float64),
        "f16": torch.tensor([0.1, 65504], dtype=torch.float16),
        "bf16": torch.tensor([[0.1], [3e38]], dtype=torch.bfloat16),
        "f8": torch.tensor([0.5, 448, nan]).to(torch.float8_e4m3fn),
        "i8": torch.tensor([-128, 127], dtype=torch.int8),
        "i64": torch.tensor([-(2**63), 2**63 - 1]),
        "u8": torch.tensor([0, 255], dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
        "c64": torch.tensor([1 + 2j, complex(nan, -inf)]),
        "odd": torch.tensor([nan, inf, -inf, 0.0]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "row": torch.ones(1, 3).expand(2, 3),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, 2, device="meta"),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "lr": 1e-4,
        "name": "a\tb\x1b[0m",
        "huge": 10**5000,
    }


def _layouts() -> dict[str, object]:
    """One tensor of each layout that torch makes without more than itself."""
    dense = torch.tensor([[0.0, 1.5, 0.0], [2.0, 0.0, 0.0]])
    return {
        "q": torch.quantize_per_tensor(torch.tensor([-1.0, 0.0, 2.0]), 0.1, 10, torch.quint8),
        "channels": torch.quantize_per_channel(
            dense, torch.tensor([0.5, 0.25]).double(), torch.tensor([0, 3]), 0, torch.qint8
        ),
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.zeros(1)]),
        "meta": torch.empty(2, 2, device="meta"),
        "lazy": torch.nn.UninitializedParameter(),
    }


def _layers() -> dict[str, torch.Tensor]:
    state = {"embed.weight": torch.zeros(10, 4)}
    for layer in range(4):
        state[f"layers.{layer}.attn.q.weight"] = torch.zeros(4, 4)
        state[f"layers.{layer}.mlp.0.weight"] = torch.zeros(8, 4)
        state[f"layers.{layer}.mlp.2.weight"] = torch.zeros(4, 8)
    state["layers.3.gate"] = torch.zeros(4)
    state["norm.weight"] = torch.zeros(4, dtype=torch.bfloat16)
    return state


def _shared() -> dict[str, torch.Tensor]:
    """Tensors that are tied, that overlap, that only lie in one storage, and one that keeps a large storage."""
    flat, wide = torch.arange(12.0), torch.zeros(1000)
    return {
        "tied.a": flat[:4],
        "tied.b": flat[:4],
        "left": flat[2:6],
        "far": flat[8:],
        "part": wide[:10],
        "alone": torch.ones(3),
        "equal": torch.ones(3),
    }


def _network() -> torch.nn.Module:
    """A pickled network with equal blocks, one layer used twice and a child that is None."""
    nn = torch.nn
    shared = nn.Linear(4, 4)
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)) for _ in range(3)])
    net = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3, padding=1), "blocks": blocks, "up": shared, "down": shared})
    net.register_module("skip", None)
    return net


def _oddly_named() -> dict[str, torch.Tensor]:
    names = [
        "tab\there",
        "line\nbreak",
        "esc\x1b[31mred",
        "pipe|pipe",
        "",
        "ünï",
        "a[0]",
        "it's",
        'say "hi"',
        "\u202eevil",
    ]
    return {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
