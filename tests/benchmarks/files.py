"""Write the files that the benchmarks read: sparse where they are large, so that they take no disk.

python files.py FOLDER
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import shutil
import struct
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TENSORS = 200
SIZES = {"1GB": 10**9, "20GB": 20 * 10**9}


def write_sparse_pt(path: Path, nbytes: int) -> None:
    """A torch.save file of 200 float32 tensors; torch leaves out the data and the file system stores holes."""
    columns = nbytes // TENSORS // 4 // 1000
    state = {f"layers.{i // 4}.part{i % 4}.weight": torch.empty(1000, columns) for i in range(TENSORS)}
    with torch.serialization.skip_data():
        torch.save(state, path)


def write_sparse_safetensors(path: Path, nbytes: int) -> None:
    """The same names and shapes as a safetensors file whose data is one hole."""
    columns = nbytes // TENSORS // 4 // 1000
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    size = 1000 * columns * 4
    for i in range(TENSORS):
        name = f"layers.{i // 4}.part{i % 4}.weight"
        header[name] = {"dtype": "F32", "shape": [1000, columns], "data_offsets": [i * size, (i + 1) * size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + TENSORS * size)


def write_run(folder: Path, steps: int) -> None:
    """A run of checkpoints of 1 GB that are sparse; in each some elements of every tensor are other ones."""
    folder.mkdir()
    for step in range(steps):
        path = folder / f"{step}.safetensors"
        write_sparse_safetensors(path, SIZES["1GB"])
        with path.open("r+b") as file:
            for at in range(100_000, 10**9, 5_000_000):
                file.seek(at // 4 * 4)
                file.write(struct.pack("<8f", *(1e-3 * (step + place) for place in range(8))))


def write_sparse_legacy(path: Path, nbytes: int) -> None:
    """The same names and shapes as torch.save wrote them before 1.6, the storages holes."""
    columns = nbytes // TENSORS // 4 // 1000
    state = {f"layers.{i // 4}.part{i % 4}.weight": torch.empty(1000, 1) for i in range(TENSORS)}
    numel = 1000 * columns
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    for _ in range(3):
        pickle.load(buffer)
    begin = buffer.tell()
    dump = io.BytesIO()
    references = {}
    for number, name in enumerate(state):
        pid = ("storage", torch.FloatStorage, str(number), "cpu", numel, None)
        references[name] = _Reference(pid, (1000, columns))
    _Pickler(dump, 2).dump(references)
    pickle.dump([str(number) for number in range(TENSORS)], dump, 2)
    with path.open("wb") as file:
        file.write(buffer.getvalue()[:begin] + dump.getvalue())
        for _ in range(TENSORS):
            file.write(struct.pack("<q", numel))
            file.seek(4 * numel, 1)
        file.truncate()


def write_set(folder: Path, shards: int, nbytes: int) -> None:
    """A set of safetensors shards of so many bytes each, as the Hugging Face hub has them, and its index."""
    folder.mkdir()
    columns = nbytes // 12 // 4 // 1000
    weight_map: dict[str, str] = {}
    for number in range(1, shards + 1):
        shard = f"model-{number:05}-of-{shards:05}.safetensors"
        names = [f"layers.{number}.part{part}.weight" for part in range(12)]
        size = 4000 * columns
        header = {
            name: {"dtype": "F32", "shape": [1000, columns], "data_offsets": [part * size, (part + 1) * size]}
            for part, name in enumerate(names)
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 12 * size)
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": shards * nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


class _Pid:
    """What becomes a persistent id."""

    def __init__(self, pid: tuple[object, ...]) -> None:
        self.pid = pid


class _Reference:
    """What becomes a view of a whole storage."""

    def __init__(self, pid: tuple[object, ...], shape: tuple[int, int]) -> None:
        self.pid = pid
        self.shape = shape

    def __reduce__(self) -> tuple[object, ...]:
        view = (_Pid(self.pid), 0, self.shape, (self.shape[1], 1), False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, view


class _Pickler(pickle.Pickler):
    """Writes persistent ids."""

    def persistent_id(self, item: object) -> object:
        return item.pid if isinstance(item, _Pid) else None


def write_many(path: Path, count: int) -> None:
    """A file of many small tensors, of the format that its name says."""
    state = {f"layers.{i // 10}.part{i % 10}.weight": torch.zeros(4) for i in range(count)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def write_real(path: Path) -> None:
    """A torch.save file of a gigabyte that is no hole, as copies and casts of it have to go through all of it."""
    torch.manual_seed(0)
    torch.save({f"layers.{i}.weight": torch.randn(1000, 1250) for i in range(TENSORS)}, path)


def write_values(folder: Path) -> None:
    """Files full of numbers: 4 GB of float32, 1 GB of it, a copy and what differs in every element, 1 GB of halves."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{i}.weight": torch.randn(62_500, 1000, generator=generator) for i in range(16)}
    torch.save(state, folder / "4GB.values.pt")
    some = {name: state[name] for name in list(state)[:4]}
    torch.save(some, folder / "1GB.values.pt")
    shutil.copyfile(folder / "1GB.values.pt", folder / "1GB.same.pt")  # torch.save puts the file's name into it
    torch.save({name: values + 1e-3 for name, values in some.items()}, folder / "1GB.other.pt")
    for dtype in (torch.bfloat16, torch.float16):
        halves = {name: state[name].to(dtype) for name in list(state)[:8]}
        torch.save(halves, folder / f"1GB.{str(dtype).removeprefix('torch.')}.pt")
    torch.save({f"layers.{i}.weight": torch.randn(16, 16) for i in range(TENSORS)}, folder / "200.pt")


def write_zero(path: Path) -> None:
    """A folder of DeepSpeed's ZeRO stage 2 of four ranks, 600 MB of float32 master copies and as much of a state."""
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    from zero_folders import zero_folder

    shapes = {"a": (1024, 4096), "b": (4096, 1024), "c": (1023, 4099)}
    group = {f"h.{layer}.{name}": torch.randn(shape) for layer in range(12) for name, shape in shapes.items()}
    zero_folder(path, 2, 4, [group])


def write_lora(folder: Path) -> None:
    """A model of 1 GB in bfloat16 as transformers reads it, and an adapter of rank 16 for all its projections."""
    hidden, inner, words, layers = 2048, 5504, 32_000, 8
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": words,
              "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16, "torch_dtype":
              "bfloat16", "tie_word_embeddings": False}  # fmt: skip
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes = {**attention, "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj":
              (hidden, inner)}  # fmt: skip
    norms = ["input_layernorm", "post_attention_layernorm"]
    state = {name: torch.randn(words, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    state["model.norm.weight"] = torch.ones(hidden)
    adapter = {}
    for layer in (f"model.layers.{number}." for number in range(layers)):
        state |= {f"{layer}{name}.weight": torch.ones(hidden) for name in norms}
        for name, shape in shapes.items():
            state[f"{layer}{name}.weight"] = torch.randn(shape) / 50
            adapter[f"base_model.model.{layer}{name}.lora_A.weight"] = torch.randn(16, shape[1]) / 50
            adapter[f"base_model.model.{layer}{name}.lora_B.weight"] = torch.randn(shape[0], 16) / 50
    for name in ("lora-base", "lora-adapter"):
        (folder / name).mkdir()
    halves = {name: tensor.bfloat16() for name, tensor in state.items()}
    save_file(halves, folder / "lora-base" / "model.safetensors", metadata={"format": "pt"})
    (folder / "lora-base" / "config.json").write_text(json.dumps(config))
    save_file(adapter, folder / "lora-adapter" / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in shapes]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": targets}
    (folder / "lora-adapter" / "adapter_config.json").write_text(json.dumps(settings))


def write_fp8(folder: Path) -> None:
    """Weights of 512 MB in fp8 with a scale for each block of 128 × 128, as DeepSeek has them."""
    folder.mkdir()
    state = {}
    for number in range(8):
        state[f"layers.{number}.weight"] = (torch.randn(8192, 8192) * 100).to(torch.float8_e4m3fn)
        state[f"layers.{number}.weight_scale_inv"] = torch.rand(64, 64) / 1000
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config))


def write_other(folder: Path) -> None:
    """A second model like that of the adapter, and what mergekit shall make of both."""
    shutil.copytree(folder / "lora-base", folder / "lora-other")
    state = {name: tensor + 0.01 for name, tensor in load_file(folder / "lora-base" / "model.safetensors").items()}
    save_file(state, folder / "lora-other" / "model.safetensors", metadata={"format": "pt"})
    lines = ["merge_method: linear", "dtype: float32", "out_dtype: bfloat16", "models:"]
    lines += [f"- {{model: {folder / name}, parameters: {{weight: 1.0}}}}" for name in ("lora-base", "lora-other")]
    (folder / "linear.yaml").write_text("\n".join(lines))


def main(folder: Path) -> None:
    """Write all files."""
    write_lora(folder)
    write_other(folder)
    write_fp8(folder / "fp8-blocks")
    write_values(folder)
    for name, nbytes in SIZES.items():
        write_sparse_pt(folder / f"{name}.pt", nbytes)
        write_sparse_safetensors(folder / f"{name}.safetensors", nbytes)
    write_sparse_safetensors(folder / "20GB.names.safetensors", SIZES["20GB"])
    write_run(folder / "run.1GB.values", 50)
    write_sparse_legacy(folder / "20GB.legacy.pt", SIZES["20GB"])
    write_set(folder / "set", 200, 5 * 10**9)
    write_many(folder / "10k.pt", 10_000)
    write_many(folder / "66k.pt", 66_000)
    write_many(folder / "100k.safetensors", 100_000)
    write_real(folder / "real.pt")
    write_zero(folder / "zero")
    torch.save({"0.weight": torch.ones(8, 4), "0.bias": torch.ones(8)}, folder / "small.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
