"""A name is judged by all that it could reach, and the names of known packages by an allowlist."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization.quantize_fx
from builders.pickles import call, named, new, pickled
from code_effects import effect
from name_walk import QUIET, Walk, long_name, walk
from scanning import codes, scanned, stacked

from ckpt_cli.ops.scan import scan
from ckpt_cli.scanner.judge import judge

THROUGH = """
torch.nn.functional torch.hub._load_local|torch.nn.functional torch.hub.load|torch.nn.functional torch.load
torch.nn.functional torch._C.PyTorchFileWriter|torch.nn.functional torch.classes.load_library
torch nn.functional.torch.hub._load_local|torch nn.functional.torch.serialization.load|torch serialization.os.system
torch.utils._sympy.functions sympy.sympify|torch.serialization io.open
torch.nn.modules.linear torch.package.PackageImporter
zipfile._path pathlib.Path.write_text|zipfile._path io.open|collections.abc sys.modules|numpy.ma.core np.load
sklearn.base np.fromfile|lab.models np.load|lab.models np.lib.npyio.DataSource|lab.models torch.hub.load
lab.models hub.load|lab.models serialization.load|lab.models pd.read_pickle|lab.models io.open|lab.models builtins.eval
lab.models functools.partial|lab.models operator.attrgetter|lab.models pickle.loads|lab.models joblib.load
lab.models torch.serialization.pickle.loads|lab.models torch.storage._load_from_bytes|lab.models _io.open
torch._tensor torch.storage._load_from_bytes|torch.nn.functional torch.utils.cpp_extension.load
lab.models utils.torch.ops.load_library|lab.models x.y.z.shutil.rmtree|lab Net.helper.codecs.open
""".replace("\n", "|")
DANGEROUS = [pair for pair in THROUGH.split("|") if pair]


@pytest.mark.parametrize("pair", DANGEROUS)
def test_a_dangerous_name_is_an_error_behind_any_module(tmp_path: Path, pair: str) -> None:
    found = scanned(tmp_path / "m.pkl", stacked(*pair.split(), "x"))
    assert "dangerous-global" in codes(found, "error")


@pytest.mark.parametrize(
    "pair",
    [
        "torch.hub _load_local",
        "torch._utils _import_dotted_name",
        "torch.nn.attention._fa3 _fa3_import_module",
        "torch.distributed.flight_recorder.components.loader read_dump",
        "torch.distributed.distributed_c10d _tensor_to_object",
        "torch.cuda.memory CUDAPluggableAllocator",
        "torch.fx.operator_schemas _torchscript_type_to_python_type",
        "huggingface_hub.utils._subprocess run_subprocess",
        "huggingface_hub.file_download _replace_no_matter_what",
        "mpmath.libmp.backend exec_",
        "safetensors.torch save_file",
        "pandas.core.computation.expr Expr",
        "pandas.core.computation.scope Scope",
    ],
)
def test_functions_of_packages_around_torch_that_run_or_write_are_errors(pair: str) -> None:
    assert judge(*pair.split()).verdict == "dangerous"


@pytest.mark.parametrize(
    "pair",
    [
        "torch save_everything",
        "torch.nn.modules.linear F",
        "torch.nn.modules.linear init.kaiming_uniform_",
        "torch.nn.modules.linear Linear.load_state_dict",
        "torch.distributed.distributed_c10d new_group",
        "torch.nn.attention._registry _FLASH_ATTENTION_IMPLS",
        "torch.utils.data.dataloader DataLoader",
        "numpy seterr",
        "numpy.random seed",
        "numpy.ndarray tofile",
        "pandas ExcelFile",
        "pandas.core.frame DataFrame.to_csv",
        "huggingface_hub HfApi",
        "networkx.readwrite.gml read_gml",
        "scipy.stats._continuous_distns norm_gen",
        "scipy.io.wavfile read",
        "sklearn.datasets._base load_files",
        "safetensors.torch load_file",
        "transformers.models.bert.tokenization_bert BertTokenizer",
        "transformers.models.myt5.tokenization_myt5 ByteRewriter",
        "transformers.models.bert.modeling_bert BertModel.from_pretrained",
        "transformers.integrations.integration_utils NeptuneCallback",
        "torchmetrics.image.lpip LearnedPerceptualImagePatchSimilarity",
        "pytorch_lightning.core.module LightningModule.load_from_checkpoint",
        "tqdm tqdm",
        "pathlib PosixPath.touch",
        "json.decoder JSONDecoder",
        "string Formatter",
        "lab.models np.random.seed",
        "lab.models torch.manual_seed",
        "lab.models _locale.setlocale",
    ],
)
def test_what_a_known_package_has_beyond_the_allowlist_is_a_warning(tmp_path: Path, pair: str) -> None:
    assert judge(*pair.split()).verdict == "unusual"
    assert codes(scanned(tmp_path / "m.pkl", stacked(*pair.split(), "x"))) == {"unusual-global"}


@pytest.mark.parametrize(
    "pair",
    [
        "torch.nn.modules.linear Linear",
        "torch.nn.modules.conv Conv2d",
        "torch.nn.modules.module _WrappedHook",
        "torch.nn.functional relu",
        "torch._C._nn gelu",
        "torch.nn.init xavier_uniform_",
        "torch.optim.adamw AdamW",
        "torch.optim.lr_scheduler CosineAnnealingLR",
        "torch.ao.nn.quantized.modules.linear Linear",
        "torch.return_types max",
        "torch.torch_version TorchVersion",
        "torch.distributed.tensor.placement_types Shard",
        "torch.distributed.checkpoint.metadata Metadata",
        "numpy log1p",
        "numpy.ma MaskedArray",
        "numpy.rec recarray",
        "numpy.matrixlib.defmatrix matrix",
        "numpy.random._pcg64 PCG64",
        "pandas DataFrame",
        "pandas.core.internals.managers BlockManager",
        "pandas.core.indexes.base _new_Index",
        "pandas._libs.arrays __pyx_unpickle_NDArrayBacked",
        "sklearn.pipeline Pipeline",
        "sklearn.tree._tree Tree",
        "sklearn.utils._bunch Bunch",
        "sklearn._loss._loss __pyx_unpickle_CyHalfBinomialLoss",
        "sklearn.metrics._classification accuracy_score",
        "scipy.sparse._csr csr_matrix",
        "scipy.spatial._ckdtree cKDTree",
        "joblib.numpy_pickle NumpyArrayWrapper",
        "joblib.numpy_pickle ZNDArrayWrapper",
        "omegaconf.dictconfig DictConfig",
        "torchmetrics.classification.accuracy MulticlassAccuracy",
        "pytorch_lightning.utilities.parsing AttributeDict",
        "lightning.pytorch.callbacks.early_stopping EarlyStopping",
        "transformers.models.bert.modeling_bert BertModel",
        "transformers.training_args TrainingArguments",
        "transformers.tokenization_utils_base BatchEncoding",
        "accelerate.utils.dataclasses DistributedType",
        "networkx.classes.graph Graph",
        "collections OrderedDict",
        "pathlib PosixPath",
        "fractions Fraction",
    ],
)
def test_the_ordinary_classes_of_known_packages_are_quiet(pair: str) -> None:
    assert judge(*pair.split()).verdict in ("allowed", "harmless")


# --- names that calls make --------------------------------------------------------------------------------------------


def _attribute(module: str, name: str, *attributes: str) -> Any:
    node = named(f"{module}.{name}")
    for attribute in attributes:
        node = call("builtins.getattr", node, attribute)
    return node


@pytest.mark.parametrize(
    ("node", "severity"),
    [
        (_attribute("torch.nn.functional", "torch", "hub"), "error"),
        (_attribute("torch.nn.functional", "torch", "nn", "modules"), "warning"),
        (_attribute("torch.nn.modules.linear", "Linear", "load_state_dict"), "warning"),
        (_attribute("torch.nn.modules.linear", "Linear", "__init__", "__globals__"), "error"),
        (call("builtins.getattr", new("torch.nn.modules.linear.Linear"), "compile"), "warning"),
        (call("numpy.core._ufunc_reconstruct", "os", "system"), "error"),
        (call("numpy._core._ufunc_reconstruct", "builtins", "getattr"), "error"),
        (call("numpy._core._ufunc_reconstruct", call("lab.f"), "f"), "error"),
        (call("numpy._core._ufunc_reconstruct", "numpy", "seterr"), "warning"),
        (named("numpy._core._ufunc_reconstruct"), "error"),
        (
            call("torch._tensor._rebuild_from_type_v2", named("torch.manual_seed"), named("torch.Tensor"), (1,), None),
            "warning",
        ),
        (call("functools.partial", named("torch.manual_seed"), 1), "warning"),
        (call("functools.reduce", named("lab.join"), [1, 2]), "error"),
        (call("functools.reduce", call("lab.f"), [1, 2]), "error"),
        (named("functools.reduce"), "error"),
    ],
)
def test_a_name_that_is_reached_by_a_call_is_judged(tmp_path: Path, node: Any, severity: str) -> None:
    assert codes(scanned(tmp_path / "m.pkl", pickled(node)), severity)


@pytest.mark.parametrize(
    "node",
    [
        call("numpy.core._ufunc_reconstruct", "scipy.special._ufuncs", "expit"),
        call("builtins.getattr", named("torch._C._VariableFunctionsClass"), "relu"),
        call(
            "builtins.getattr",
            named("torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"),
            "TORCH_PRESERVE_FORMAT",
        ),
        call("builtins.getattr", new("torch.nn.modules.linear.Linear"), "forward"),
        call("functools.partial", named("torch.nn.modules.normalization.LayerNorm"), 3),
        call("builtins.getattr", new("torch.optim.swa_utils.SWALR"), "_cosine_anneal"),
        call("functools.reduce", named("operator.or_"), [named("builtins.int"), named("builtins.str")]),
    ],
)
def test_what_ordinary_models_reach_by_a_call_is_quiet(tmp_path: Path, node: Any) -> None:
    found = scanned(tmp_path / "m.pkl", pickled(node))
    assert found.ok
    assert not found.findings


# --- what is installed ------------------------------------------------------------------------------------------------


def test_whole_modules_of_torch_are_quiet(tmp_path: Path) -> None:
    layer = torch.nn.TransformerEncoderLayer(4, 2, activation=torch.tanh)
    parts = [
        torch.nn.Conv2d(1, 2, 3), torch.nn.LSTM(3, 4), torch.nn.LazyLinear(3),
        torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        torch.nn.TransformerDecoderLayer(4, 2, activation="gelu"), torch.nn.ParameterList([torch.ones(1)]),
        torch.nn.utils.spectral_norm(torch.nn.Linear(2, 2)),
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(parts[0].parameters())
    schedulers = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.CyclicLR(optimizer, 0, 1),
    ]
    facts = [torch.__version__, torch.max(torch.ones(2, 2), 0), torch.distributions.Normal(0.0, 1.0)]
    torch.save([parts, optimizer, [each.state_dict() for each in schedulers], facts], tmp_path / "m.pt")
    assert scan(str(tmp_path / "m.pt")).findings == []


def _runs(command: str) -> None:
    import subprocess

    subprocess.run(command, check=True)


class _Opens:
    def __setstate__(self, state: str) -> None:
        self.file = self._open(state)

    def _open(self, path: str) -> object:
        return Path(path).read_text() or open(path)


@pytest.mark.parametrize("value", [_runs, _Opens, eval, torch.load, torch.hub.load, pytest.importorskip("os").system])
def test_the_walk_sees_what_code_does(value: object) -> None:
    assert effect(value) is not None


@pytest.mark.parametrize("value", [len, torch.nn.Linear, torch.nn.functional.relu, torch.optim.AdamW])
def test_the_walk_lets_plain_code_pass(value: object) -> None:
    assert effect(value) is None


_BUILDS_CODE = "GraphModule Graph Node Tracer CodeGen Proxy OpOverload FakeTensor TorchDispatchMode Function ExitStack"


@pytest.mark.parametrize("module", ["torch.ao.quantization.fx.convert", "torch.ao.quantization.fx.graph_module"])
def test_a_class_that_a_known_module_only_hands_out_is_judged_as_where_it_is_defined(module: str) -> None:
    """A graph whose nodes hold text makes a GraphModule run that text."""
    for name in (*_BUILDS_CODE.split(), "ObservedGraphModule"):
        assert judge(module, name).verdict not in ("allowed", "harmless"), name


def test_no_module_of_torch_hands_out_a_class_that_is_dangerous_at_home() -> None:
    """Quiet names are known by the module that they are taken from."""
    wrong = []
    for module in [module for name, module in sys.modules.items() if name.startswith("torch.")]:
        for name, value in list(vars(module).items()):
            if issubclass(type(value), type) and judge(module.__name__, name).verdict in ("allowed", "harmless"):
                home = f"{value.__module__}.{value.__qualname__}"
                if judge(value.__module__, value.__qualname__).verdict == "dangerous" and home not in _FINE:
                    wrong.append(f"{module.__name__}.{name}: {home}")
    assert wrong == []


_FINE = {"torch._vendor.packaging.version.Version", "torch._vendor.packaging.version.InvalidVersion"}
"""Classes of data in packages of which nothing else belongs into a checkpoint."""


PACKAGES = [
    "torch.nn.modules", "torch.nn.functional", "torch.optim.lr_scheduler", "torch.hub", "torch.serialization",
    "numpy.random",
    "numpy.ma", "mpmath.libmp", "safetensors.torch", "collections", "json", "zipfile", "pathlib", "datetime",
]  # fmt: skip


def test_no_installed_name_that_does_something_is_quiet() -> None:
    """All packages are walked by tests/support/name_walk.py."""
    state = Walk()
    assert list(walk(PACKAGES, state)) == []
    assert state.judged > 20_000


def test_no_long_way_through_the_modules_of_torch_is_quiet() -> None:
    choice = random.Random(0)
    names = {long_name(torch, choice) for _ in range(500)} - {None}
    quiet = {name for name in names if judge("torch", str(name)).verdict not in ("dangerous", "unusual")}
    assert {name for name in quiet if f"torch.{name}" not in QUIET} == set()


SAMPLES = Path(__file__).parent.parent / "samples"
_TENSOR = ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")


@pytest.mark.parametrize("folder", ["accelerate", "fsdp1", "fsdp2", "hsdp", "local", "megatron", "trainer", "verl"])
def test_the_files_of_training_runs_are_clean(folder: str) -> None:
    found = scan(str(SAMPLES / folder))
    assert found.pickles
    assert not found.findings


@pytest.mark.parametrize("folder", ["universal1", "universal3", "zero1", "zero2", "zero3"])
def test_the_files_of_deepspeed_name_its_classes_and_nothing_else(folder: str) -> None:
    found = scan(str(SAMPLES / folder)).findings
    assert {finding.severity for finding in found} == {"note"}
    assert {finding.name.partition(".")[0] for finding in found} == {"deepspeed"}


def test_the_planners_of_distributed_checkpoints_stay_alarms() -> None:
    planner = "torch.distributed.checkpoint.planner"
    assert judge(planner, "WriteItem").verdict == "harmless"
    for name in ("SavePlanner", "WriteItem.__init__", "io", "operator", "SavePlan.torch", "WriteItemType.load"):
        assert judge(planner, name).verdict in ("unusual", "dangerous"), name


@pytest.mark.parametrize(
    ("owner", "attribute", "clean"),
    [
        (_TENSOR, "ProcessGroupState", True),
        (_TENSOR, "__init__", False),
        (_TENSOR, "ProcessGroupState.__init__", False),
        (_TENSOR, "from_local", False),
        (("torch.distributed._shard.sharded_tensor.api", "sharded_op_impl"), "ProcessGroupState", False),
        (("torch.distributed.remote_device", "torch"), "ProcessGroupState", False),
        (("torch.distributed.remote_device", "torch"), "load", False),
        (("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"), "__reduce_ex__", False),
    ],
)
def test_no_other_attribute_is_clean_for_that(
    tmp_path: Path, owner: tuple[str, str], attribute: str, clean: bool
) -> None:
    item = call("builtins.getattr", named(".".join(owner)), attribute)
    assert (not codes(scanned(tmp_path / "m.pkl", pickled(item)))) is clean
