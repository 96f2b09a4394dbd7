"""`ckpt tree`: what it makes of state_dicts, training checkpoints, TorchScript, old files, ties and hostile graphs."""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pickles import Ops, pickled, value
from conftest import Ckpt
from safetensors.torch import save_file
from torch import nn

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.model.checkpoint import Checkpoint, Storage
from ckpt_cli.nn.tree import Tree, tree_of, walk
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.render.tree import View, tree_text


class Block(nn.Module):
    """A transformer's block, of a class that ckpt cannot import."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.act, self._cache, self.none = dim, "gelu", 3, None
        self.attn = nn.MultiheadAttention(dim, 2)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Network(nn.Module):
    """Tied weights, repeated blocks, a parameter of its own, a shared activation and a child that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(10, 8)
        self.h = nn.ModuleList([Block(8) for _ in range(3)])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.wte.weight
        self.scale = nn.Parameter(torch.ones(1, 8))
        self.act = nn.ReLU()
        self.act2 = self.act
        self.register_module("down", None)


class Plain(nn.Module):
    """A class whose instances have no settings of their own, so that print(net) tells what ckpt tells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.down = None
        self.register_module("up", None)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)])


@pytest.fixture
def tree(tmp_path: Path, ckpt: Ckpt) -> Any:
    """What `ckpt tree` prints of an object that torch.save saved."""

    def call(saved: object, *args: object, **options: Any) -> str:
        torch.save(saved, tmp_path / "x.pt", **options)
        answer = ckpt("tree", tmp_path / "x.pt", *args)
        assert (answer.code, answer.err) == (0, "")
        return answer.out

    return call


# --- pickled modules --------------------------------------------------------------------------------------------------


def test_a_pickled_network_piped_is_what_print_shows(tree: Any) -> None:
    net = Plain()
    assert tree(net) == f"{net!r}\n"


class Numbered(nn.Module):
    """A block that knows which one it is, as those of the transformers library do."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.fc = number, nn.Linear(2, 2)


def test_blocks_that_print_alike_are_one_line_without_the_settings_in_which_they_differ(tree: Any) -> None:
    net = nn.ModuleList([Numbered(number) for number in range(3)])
    assert tree(net) == f"{net!r}\n"
    assert "(0-2): 3 x Numbered(" in tree(net)
    assert "(1): Numbered(\n    layer_idx=1\n" in tree(net, "--full")
    assert "(0-2): 3 x Numbered(\n    layer_idx=5\n" in tree(nn.ModuleList([Numbered(5) for _ in range(3)]))


def test_bare_is_what_print_shows_of_classes_without_a_text_of_their_own(tree: Any) -> None:
    assert tree(Network(), "--bare") == f"{Network()!r}\n"


def test_an_unknown_class_is_told_with_its_public_numbers_and_texts(tree: Any) -> None:
    out = tree(Block(8))
    assert out.splitlines()[:2] == ["Block(", "  dim=8, act='gelu'"]
    assert "_cache" not in out
    assert "training" not in out
    torch_lines = repr(Block(8)).splitlines()
    assert out.splitlines()[2:] == torch_lines[1:]


def test_modules_of_all_protocols_are_read(tree: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True))
    for protocol in (1, 2, 3, 4, 5):
        assert tree(net, pickle_protocol=protocol) == f"{net!r}\n"


def test_modules_within_a_training_checkpoint_are_found(tree: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 8))
    out = tree({"model": net, "extra": [{"ema": nn.Sequential(nn.Linear(4, 8))}], "epoch": 3})
    assert out == (
        "dict(\n"
        "  (model): Sequential(\n"
        "    (0): Linear(in_features=4, out_features=8, bias=True)\n"
        "  )\n"
        "  (extra): list(\n"
        "    (0): dict(\n"
        "      (ema): Sequential(\n"
        "        (0): Linear(in_features=4, out_features=8, bias=True)\n"
        "      )\n"
        "    )\n"
        "  )\n"
        ")\n"
    )


def test_a_module_of_an_older_torch_lacks_attributes_and_is_shown_with_their_defaults(tree: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.BatchNorm2d(4), nn.Softmax(), nn.LSTM(2, 3))
    expected = f"{net!r}\n"
    for number, name in (
        (0, "padding_mode"),
        (1, "approximate"),
        (2, "track_running_stats"),
        (3, "dim"),
        (4, "proj_size"),
    ):
        del net[number].__dict__[name]
    assert tree(net) == expected


def test_a_class_that_the_legacy_format_refers_to_by_persistent_id_is_known() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(net, buffer, _use_new_zipfile_serialization=False)
    data, offset = buffer.getvalue(), 0
    for _ in range(3):  # the magic number, the version, what is said of the machine
        offset += read_pickle(data, offset=offset).nbytes
    assert b"module" in data[offset:]
    assert text_of(graph_tree(data, offset=offset)) == f"{net!r}\n"


def test_a_module_that_python_2_pickled_is_known() -> None:
    def raw(text: str) -> Ops:
        return Ops(b"U" + bytes((len(text),)) + text.encode())

    def mapping(**pairs: object) -> Ops:
        return Ops(b"}(" + b"".join(raw(key) + value(item) for key, item in pairs.items()) + b"u")

    state = mapping(
        _parameters=mapping(weight=None), _buffers=mapping(), _modules=mapping(), inplace=True, negative_slope=0.2
    )
    leaky = Ops(b"ctorch.nn.modules.activation\nLeakyReLU\n)\x81" + state + b"b")
    assert text_of(graph_tree(pickled(leaky))) == "LeakyReLU(negative_slope=0.2, inplace=True)\n"


# --- TorchScript ------------------------------------------------------------------------------------------------------


class _AnyStorage:
    """A finder that has every storage."""

    big_endian = False

    def __init__(self) -> None:
        self.known: dict[str, Storage] = {}

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        return self.known.setdefault(key, Storage(key, nbytes, location))


def graph_tree(data: bytes, offset: int = 0) -> Tree:
    """The tree of a pickle by itself."""
    graph = read_pickle(data, offset=offset)
    entries = entries_of(graph, _AnyStorage())
    container: Any = None
    return tree_of(Checkpoint("x", "test", entries, container, document=graph))


def text_of(found: Tree, style: str = "auto", **options: Any) -> str:
    return "".join(tree_text(found, View(**options), style))


def scripted(module: Any) -> Tree:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    with zipfile.ZipFile(buffer) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return graph_tree(archive.read(name))


class Scripted(nn.Module):
    """Layers of which TorchScript keeps few settings."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Dropout(), nn.LayerNorm(3))
        self.conv = nn.ConvTranspose2d(3, 5, 3)
        self.bn = nn.BatchNorm2d(5)
        self.lstm = nn.LSTM(2, 3, 2, bidirectional=True)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.table = nn.Embedding(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_has_its_true_classes_and_what_its_shapes_tell() -> None:
    assert text_of(scripted(torch.jit.script(Scripted())), bare=True) == (
        "Scripted(\n"
        "  (seq): Sequential(\n"
        "    (0): Linear(in_features=2, out_features=3, bias=False)\n"
        "    (1): ReLU()\n"
        "    (2): Dropout()\n"
        "    (3): LayerNorm((3,))\n"
        "  )\n"
        "  (conv): ConvTranspose2d(3, 5, kernel_size=(3, 3), stride=?)\n"
        "  (bn): BatchNorm2d(5)\n"
        "  (lstm): LSTM(2, 3, num_layers=2, bidirectional=True)\n"
        "  (blocks): ModuleList(\n"
        "    (0-1): 2 x Linear(in_features=2, out_features=2, bias=True)\n"
        "  )\n"
        "  (table): Embedding(5, 4)\n"
        ")\n"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_is_told_by_names_without_their_mangling() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Tanh())
    found = scripted(torch.jit.trace(net, torch.ones(1, 2)))
    assert text_of(found, bare=True) == f"{net!r}\n"
    assert {branch.told.qualified for branch in walk(found.root)} == {
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.activation.Tanh",
    }


# --- state_dicts ------------------------------------------------------------------------------------------------------

KINDS: list[tuple[nn.Module, str]] = [
    (nn.Linear(4, 8), "Linear(in_features=4, out_features=8, bias=True)"),
    (nn.Linear(4, 8, bias=False), "Linear(in_features=4, out_features=8, bias=False)"),
    (nn.Conv1d(3, 4, 5), "Conv1d(3, 4, kernel_size=(5,), stride=?)"),
    (nn.Conv2d(3, 16, (3, 5), bias=False), "Conv2d(3, 16, kernel_size=(3, 5), stride=?, bias=False)"),
    (nn.Conv3d(3, 4, 2), "Conv3d(3, 4, kernel_size=(2, 2, 2), stride=?)"),
    (nn.Conv2d(4, 4, 3, groups=4), "Conv2d(1, 4, kernel_size=(3, 3), stride=?, groups=?)"),
    (nn.ConvTranspose2d(3, 16, 3), "ConvTranspose2d(3, 16, kernel_size=(3, 3), stride=?)"),
    (nn.BatchNorm2d(6), "BatchNorm(6)"),
    (nn.BatchNorm1d(6, affine=False), "BatchNorm(6)"),
    (nn.LayerNorm(6), "LayerNorm((6,))"),
    (nn.RMSNorm(6), "RMSNorm((6,))"),
    (nn.PReLU(), "PReLU(num_parameters=1)"),
    (nn.LSTM(2, 3, 2, bidirectional=True), "LSTM(2, 3, num_layers=2, bidirectional=True)"),
    (nn.LSTM(2, 6, proj_size=3), "LSTM(2, 6, proj_size=3)"),
    (nn.GRU(2, 3, bias=False), "GRU(2, 3, bias=False)"),
    (nn.RNN(2, 3), "RNN(2, 3)"),
    (nn.LSTMCell(2, 3), "LSTMCell(2, 3)"),
    (nn.GRUCell(2, 3, bias=False), "GRUCell(2, 3, bias=False)"),
]


@pytest.mark.parametrize(("layer", "text"), KINDS, ids=[text for _, text in KINDS])
def test_a_layer_is_inferred_from_the_names_and_shapes_of_its_tensors(tree: Any, layer: nn.Module, text: str) -> None:
    state = nn.ModuleDict({"layer": layer}).state_dict()
    assert tree(state) == f"Module(  # inferred from names and shapes\n  (layer): {text}\n)\n"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wte", "Embedding"),
        ("embed_tokens", "Embedding"),
        ("token_embd", "Embedding"),
        ("pos_emb", "Embedding"),
        ("lm_head", "Linear"),
        ("embed_out", "Linear"),
        ("time_emb_proj", "Linear"),
        ("stoken", "Linear"),
    ],
)
def test_a_table_of_vectors_is_told_from_a_linear_layer_by_its_name(tree: Any, name: str, kind: str) -> None:
    assert f"({name}): {kind}(" in tree({f"{name}.weight": torch.ones(5, 4)})


def test_what_makes_no_layer_is_listed(tree: Any) -> None:
    out = tree(
        {"cls": torch.ones(1, 2), "a.gate": torch.ones(3), "b.weight": torch.ones(2, 2), "b.scale": torch.ones(2)}
    )
    assert out == (
        "Module(  # inferred from names and shapes\n"
        "  cls: float32[1,2]\n"
        "  (a): Module(gate: float32[3])\n"
        "  (b): Linear(in_features=2, out_features=2, bias=False, scale: float32[2])\n"
        ")\n"
    )


def test_low_rank_transposed_packed_and_quantized_layers_are_told(tree: Any) -> None:
    out = tree(
        {
            "q.base_layer.weight": torch.ones(6, 4),
            "q.lora_A.default.weight": torch.ones(2, 4),
            "q.lora_B.default.weight": torch.ones(6, 2),
            "c_attn.weight": torch.ones(4, 12),
            "c_attn.bias": torch.ones(12),
            "nf4.weight": torch.ones(32, 1, dtype=torch.uint8),
            "gptq.qweight": torch.ones(1, 4, dtype=torch.int32),
            "gptq.qzeros": torch.ones(1, 1, dtype=torch.int32),
            "gptq.scales": torch.ones(1, 4),
        }
    )
    assert "(q): LoRA(\n    in_features=4, out_features=6, r=2\n    (base_layer): Linear(in_features=4" in out
    assert "(c_attn): Conv1D(nf=12, nx=4)" in out
    assert "(nf4): Module(weight: uint8[32,1])" in out
    assert "(gptq): QuantLinear(qweight: int32[1,4], qzeros: int32[1,1], scales: float32[1,4])" in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_packed_weight_of_a_quantized_layer_tells_its_shape(tree: Any) -> None:
    net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 4)))
    assert "(0): QuantizedLinear(in_features=3, out_features=4)" in tree(net.state_dict())
    assert "(0): DynamicQuantizedLinear(in_features=3, out_features=4)" in tree(net)


def test_an_attention_layer_and_equal_blocks_are_inferred(tree: Any) -> None:
    block = (
        "(attn): MultiheadAttention(\n"
        "        (out_proj): NonDynamicallyQuantizableLinear(in_features=8, out_features=8, bias=True)\n"
        "      )\n"
        "      (norm): LayerNorm((8,))\n"
        "      (mlp): Sequential(\n"
        "        (0): Linear(in_features=8, out_features=16, bias=True)\n"
        "        (2): Linear(in_features=16, out_features=8, bias=True)\n"
    )
    state = Network().state_dict()
    assert f"(h): ModuleList(\n    (0-2): 3 x Module(\n      {block}" in tree(state)
    full = tree(state, "--full")
    assert full.count(block) == 3
    assert "(2): Module(" in full


def test_blocks_that_differ_do_not_collapse(tree: Any) -> None:
    shapes = {0: 2, 1: 2, 2: 3, 4: 3}
    out = tree({f"m.{number}.fc.weight": torch.ones(size, 2) for number, size in shapes.items()})
    assert [line.split(":")[0].strip() for line in out.splitlines() if " x " in line] == ["(0-1)"]
    assert "(2): Module(" in out
    assert "(4): Module(" in out


def test_equal_layers_of_a_sequential_stay_apart_as_torch_shows_them(tree: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert tree(net) == f"{net!r}\n"
    assert tree(net.state_dict(), "--bare") == f"{net!r}\n"


def test_the_numbers_of_a_safetensors_file_come_in_their_order(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({f"net.{number}.weight": torch.ones(number + 1, 2) for number in range(12)}, tmp_path / "x.safetensors")
    rows = [line.split("\t")[0] for line in ckpt("tree", "-f", "tsv", tmp_path / "x.safetensors").lines]
    assert rows[2:] == [f"net.{number}" for number in range(12)]


# --- training checkpoints ---------------------------------------------------------------------------------------------


def test_an_optimizers_tensors_are_counted_and_make_no_layers(tree: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 8))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    out = tree({"model": net.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 1})
    assert out == (
        "dict(\n"
        "  (model): Sequential(  # inferred from names and shapes\n"
        "    (0): Linear(in_features=4, out_features=8, bias=True)\n"
        "  )\n"
        "  (optimizer_states): list(\n"
        "    (0): dict(6 tensors)\n"
        "  )\n"
        ")\n"
    )


def test_where_only_names_tell_an_optimizer_is_known_by_its_name(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({"model.0.weight": torch.ones(2, 2), "optimizer.state.0.exp_avg": torch.ones(2, 2)}, tmp_path / "x")
    out = ckpt("tree", tmp_path / "x").out
    assert "(optimizer): dict(1 tensor)\n" in out
    assert "(0): Linear(in_features=2, out_features=2, bias=False)" in out


def test_a_tensor_beside_state_dicts_does_not_make_a_module_of_them(tree: Any) -> None:
    state = {"0.weight": torch.ones(2, 2)}
    out = tree({"model": state, "ema": {"0.weight": torch.zeros(2, 2)}, "rng": torch.ones(3, dtype=torch.uint8)})
    assert out.startswith("dict(\n  rng: uint8[3]\n  (model): Sequential(  # inferred")
    assert tree({"model": nn.Tanh(), "rng": torch.ones(3)}) == "dict(\n  rng: float32[3]\n  (model): Tanh()\n)\n"
    nested = tree({"a": {"model": state, "args": {"b": {}}}, "step": torch.ones(())})
    assert nested.startswith("dict(\n  step: float32[]\n  (a): dict(\n    (model): Sequential(  # inferred")


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (torch.ones(2), "Module('': float32[2])"),
        ([torch.ones(2)], "list(0: float32[2])"),
        ({}, "dict()"),
        (3, "dict()"),
    ],
)
def test_what_holds_no_modules_is_told_too(tree: Any, saved: object, text: str) -> None:
    assert tree(saved).startswith(text)


# --- sizes and ties ---------------------------------------------------------------------------------------------------


def sizes(found: Tree) -> dict[str, tuple[int, int]]:
    return {branch.path: (branch.parameters, branch.nbytes) for branch in walk(found.root)}


def test_parameters_and_bytes_count_ties_once_within_each_subtree(tree: Any) -> None:
    net = Network()
    told = json.loads(tree(net, "--json", "--full"))
    assert told["inferred"] is False
    counted = {}
    stack = [told["tree"]]
    while stack:
        branch = stack.pop()
        counted[branch["path"]] = (branch["parameters"], branch["nbytes"])
        stack += branch["children"]
    for name, module in net.named_modules(remove_duplicate=False):
        expected = sum(parameter.numel() for parameter in module.parameters())
        assert counted[name] == (expected, 4 * expected), name


def test_a_tied_module_points_at_the_first_one(tree: Any) -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    net = nn.Sequential(shared, nn.ReLU(), shared)
    assert "  (2): = (0)\n)" in tree(net)
    assert tree(net, "--bare") == f"{net!r}\n"
    assert "(2): = (0)" not in tree(net, "--full")
    state = net.state_dict()
    assert "  (2): = (0)\n)" in tree(state)
    assert "= (model)" in tree({"model": net, "ema": net})


def test_a_module_of_another_class_is_told_to_be_tied_and_shown(tree: Any) -> None:
    out = tree(Network(), "-f", "table")
    line = next(line for line in out.splitlines() if "(head)" in line)
    text, note = line.split("  # ")
    assert text.strip() == "(head): Linear(in_features=8, out_features=10, bias=False)"
    assert note == "80 parameters, 320 B, tied to wte"
    assert "(act2): = (act)" in out
    assert "(down): None" in out


def test_equal_values_that_are_stored_apart_are_not_tied(tree: Any) -> None:
    assert " = (" not in tree({"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})


def test_modules_without_tensors_are_only_tied_where_they_are_one_object(tree: Any) -> None:
    relu = nn.ReLU()
    out = tree(nn.Sequential(relu, nn.ReLU(), relu))
    assert out == "Sequential(\n  (0): ReLU()\n  (1): ReLU()\n  (2): = (0)\n)\n"


# --- options ----------------------------------------------------------------------------------------------------------


def test_depth_leaves_out_what_lies_deeper(tree: Any) -> None:
    net = Network()
    assert tree(net, "--depth", "0") == "Network(...)\n"
    assert "  (h): ModuleList(...)\n" in tree(net, "--depth", "1")
    assert "    (0-2): 3 x Block(dim=8, act='gelu', ...)\n" in tree(net, "--depth", "2")


def test_a_name_shows_one_subtree_and_a_wrong_one_suggests_others(tree: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    assert tree(Network(), "h.1.norm") == "LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)\n"
    answer = ckpt("tree", tmp_path / "x.pt", "h.1.nrm")
    assert answer.code == 2
    assert "did you mean h.1.norm" in answer.err
    assert "did you mean h.1.norm?" in ckpt("tree", tmp_path / "x.pt", "h.1.norm.weight").err


def test_json_has_its_documented_keys_and_points_at_ties(tree: Any) -> None:
    told = json.loads(tree({"a.weight": (shared := torch.ones(2, 3)), "b.weight": shared}, "--json"))
    assert set(told) == {"path", "format", "inferred", "tree"}
    assert told["inferred"] is True
    first, second = told["tree"]["children"]
    assert first == {
        "name": "a",
        "path": "a",
        "class": "Linear",
        "text": "Linear(in_features=3, out_features=2, bias=False)",
        "inferred": True,
        "parameters": 6,
        "nbytes": 24,
        "tied_to": None,
        "tensors": [
            {"name": "a.weight", "kind": "tensor", "dtype": "float32", "shape": [2, 3], "numel": 6, "nbytes": 24}
        ],
        "children": [],
    }
    assert second["tied_to"] == "a"


def test_rows_have_a_module_each(tree: Any) -> None:
    rows = [line.split("\t") for line in tree({"0.weight": torch.ones(2, 3)}, "-f", "tsv").splitlines()]
    assert rows == [
        ["''", "Sequential()", "6", "24", "yes", ""],
        ["0", "Linear(in_features=3, out_features=2, bias=False)", "6", "24", "yes", ""],
    ]


def test_names_and_settings_cannot_write_to_the_terminal(tree: Any) -> None:
    net = nn.Conv2d(1, 1, 1)
    net.padding_mode = "\x1b[31m\nred"
    for saved in (net, {"a\x1b[31m.weight": torch.ones(2, 2)}, {"x\n": net}):
        for style in ("auto", "table", "tsv"):
            out = tree(saved, "-f", style)
            assert out.replace("\n", "").replace("\t", "").isprintable()
            assert "\nred" not in out


# --- hostile graphs ---------------------------------------------------------------------------------------------------


def module_ops(children: dict[str, Any], kind: str = "Sequential") -> Ops:
    state = {"_parameters": {}, "_buffers": {}, "_modules": children, "training": True}
    return Ops(b"ctorch.nn.modules.container\n" + kind.encode() + b"\n)\x81" + value(state) + b"b")


def test_a_module_within_itself_is_cut() -> None:
    looped = Ops(
        b"ctorch.nn.modules.container\nSequential\n)\x81q\x00"
        + value({"_parameters": {}, "_buffers": {}, "_modules": {"0": Ops(b"h\x00")}})
        + b"b"
    )
    assert text_of(graph_tree(pickled(looped))) == "Sequential(\n  (0): <the same module again>\n)\n"


def test_shared_modules_cannot_multiply_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    level = Ops(module_ops({}) + b"q\x00")
    for slot in range(1, 11):
        again = Ops(b"h" + bytes((slot - 1,)))
        level = Ops(module_ops({"0": level, "1": again}) + b"q" + bytes((slot,)))
    data = pickled(level)
    found = graph_tree(data)
    assert len(list(walk(found.root))) == 2**11 - 1
    assert len(text_of(found).splitlines()) < 40
    monkeypatch.setattr(limits, "TREE_NODES", 2000)
    with pytest.raises(LimitError, match="more than 2000 modules"):
        graph_tree(data)


def test_a_shared_module_with_many_settings_cannot_multiply_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    state = {**tables, **{f"a{number}": "x" * 99 for number in range(20)}}
    big = Ops(b"cmine\nBig\n)\x81q\x00" + value(state) + b"b")
    children = {"0": big, **{str(number): Ops(b"h\x00") for number in range(1, 800)}}
    found = graph_tree(pickled(module_ops(children)))
    assert len({id(branch.told) for branch in walk(found.root)}) == 2
    assert len(text_of(found)) < 100_000
    monkeypatch.setattr(limits, "TREE_TEXT", 1_000_000)
    with pytest.raises(LimitError, match="more than 1000000 characters"):
        graph_tree(pickled(module_ops(children)))


def test_names_of_many_parts_meet_limits(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({".".join("a" * 1500): torch.ones(1)}, tmp_path / "deep")
    answer = ckpt("tree", tmp_path / "deep")
    assert (answer.code, answer.out) == (2, "")
    assert "nest deeper than 1000" in answer.err
    save_file({".".join("a" * 900): torch.ones(1)}, tmp_path / "deep")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # of the reader here
    try:
        told = json.loads(ckpt("tree", "--json", tmp_path / "deep").out)
    finally:
        sys.setrecursionlimit(before)
    assert told["tree"]["parameters"] == 1
    assert ckpt("tree", tmp_path / "deep").code == 0


def test_odd_tables_of_a_module_are_no_trouble() -> None:
    for odd in (None, 3, "text", [1, "x"], (None,), Ops(b"ca\nb\n"), [{}]):
        state = {"_parameters": odd, "_buffers": odd, "_modules": odd, "training": odd}
        data = pickled(Ops(b"ctorch.nn.modules.linear\nLinear\n)\x81" + value(state) + b"b"))
        assert "Linear" in text_of(graph_tree(data))


def test_a_large_state_dict_takes_a_second_at_most() -> None:
    state = {
        f"layers.{a}.experts.{b}.w{c}.weight": torch.ones(1, 2) for a in range(20) for b in range(64) for c in range(3)
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    began = time.process_time()
    found = graph_tree(data)
    assert len(text_of(found).splitlines()) < 20
    assert time.process_time() - began < 5
