"""Packages whose names are known: which of their classes and functions ordinary checkpoints have, and no others.

A class is known by the module that defines it and by its capital letter. It builds itself from data, and the modules
listed hand out no class that does more; `tests/support/name_walk.py` looks for one in the packages that are installed.
Functions are given one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator


def _names(module: str, words: str) -> Iterator[str]:
    return (f"{module}.{word}" for word in words.split())


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


PACKAGES = words(
    "torch functorch torchgen torch_xla numpy ml_dtypes scipy pandas sklearn joblib threadpoolctl networkx sympy "
    "mpmath gmpy2 safetensors huggingface_hub transformers tokenizers hf_xet accelerate omegaconf hydra "
    "torchmetrics lightning pytorch_lightning lightning_fabric lightning_utilities lightning_cloud antlr4 dill "
    "cloudpickle setuptools _distutils_hack pkg_resources pip wheel packaging filelock fsspec jinja2 markupsafe "
    "typing_extensions triton tqdm yaml requests urllib3 certifi idna charset_normalizer chardet httpx httpcore "
    "httpx2 httpcore2 truststore h11 anyio sniffio aiohttp six dateutil pytz tzdata cffi pycparser numexpr numba "
    "llvmlite tabulate typer click shellingham rich pygments markdown_it mdurl regex psutil"
)
"""Top-level packages of which a checkpoint has only what stands here and in `allowlist`."""

_LIGHTNING = (
    "callbacks. core. loops. utilities.data. utilities.enums. utilities.parsing. utilities.types. trainer.states."
)
_DEFINING = {
    "torch": (
        "nn. nn.modules. nn.parallel. nn.quantized. nn.quantizable. nn.qat. nn.intrinsic. nn.utils. nn.parameter. "
        "nn.attention.bias. optim. distributions. ao.nn. ao.quantization. ao.pruning. quantization. amp.grad_scaler. "
        "amp.autocast_mode. cuda.amp. utils.data.dataset. utils.data.sampler. utils.data.distributed. torch_version. "
        "distributed.device_mesh. distributed._mesh_layout. distributed.tensor. distributed._tensor. "
        "distributed._shard.sharded_tensor. "
        "distributed._shard.sharding_spec. distributed._shard.metadata. distributed._shard.sharded_optim. "
        "distributed.fsdp. distributed.optim. distributed.algorithms. distributed.checkpoint.metadata. "
        "distributed.checkpoint.stateful. nested. masked. fx.immutable_collections."
    ),
    "numpy": (
        "random. ma. polynomial. matrixlib. exceptions. dtypes. rec. core.records. _core.records. core._exceptions. "
        "_core._exceptions. lib.polynomial. lib._polynomial_impl."
    ),
    "pandas": "core. indexes. tseries. _libs. arrays. errors.",
    "sklearn": "",
    "scipy": "sparse. spatial. interpolate. optimize. signal. linalg.",
    "networkx": "classes.",
    "transformers": (
        "models. generation. modeling_ configuration_ training_args trainer_utils. trainer_pt_utils. trainer_callback. "
        "activations. pytorch_utils. cache_utils. optimization. utils.generic. utils.quantization_config."
        " file_utils. feature_extraction_utils. image_processing_utils. "
        "image_processing_base. audio_utils. image_utils."
    ),
    "accelerate": "utils.dataclasses. state.",
    "omegaconf": "base. dictconfig. listconfig. nodes. basecontainer. errors.",
    "torchmetrics": "",
    "pytorch_lightning": _LIGHTNING,
    "lightning.pytorch": _LIGHTNING,
    "lightning_fabric": "utilities.data. utilities.enums. utilities.types. wrappers.",
    "lightning.fabric": "utilities.data. utilities.enums. utilities.types. wrappers.",
}
"""Beginnings of the modules that define classes which ordinary checkpoints have; a dot ends a name."""

_BELOW = tuple(
    f"{package}.{begin}" for package, begins in _DEFINING.items() for begin in (begins.split() if begins else ("",))
)

_APART = words(
    "tests test testing _testing _mocking conftest externals datasets callback __main__ cli setup retrieval_rag"
)
"""Parts of a module's name that say that no class of it is in a checkpoint."""

_EXCEPT = re.compile(
    r"DataLoader|Library|DataFrameFormatter|ThreadpoolController|Window|Components|_ZoneInfo"
    r"|\w*(Tokenizer\w*|Retriever|Processor)|_?ARNIQA|_NoTrain\w*|_LPIPS|LearnedPerceptualImagePatchSimilarity"
    r"|PerceptualPathLength|CLIPScore|CLIPImageQualityAssessment|BERTScore|InfoLM|DISTSNetwork"
    r"|_*[A-Z0-9]+(_[A-Z0-9]+)+|PIL|_Reduction|FPGM_pruner|Tqdm|DeepSpeedStrategy|Style|Thread"
    r"|Image|ImageDraw|ImageFont|_Lazy\w+|\w*CandidateGenerator"
    r"|\w*GraphModule|\w*CodeGen|Graph|Node|Proxy|\w*Tracer|ModTracker|OpOverload|RRef|ExportedProgram"
    r"|ExportGraphSignature|PassBase|PassResult|Function|FakeTensor\w*|TorchDispatchMode|BackwardHook"
    r"|ExceptionWrapper|LazyString|ExitStack|Lock|TracebackType|MethodType|FunctionType|ModuleType|CodeType"
    r"|SkipTest|GrammarVisitor|\w*ParserRuleContext|MapWrapper|ConstantIntNode"
    r"|GuardOnDataDependentSymNode|DataFrameRenderer|ForwardRef"
)
"""Classes that these modules have or hand out, and that read or fetch files, or run something; constants; modules."""

_READING = re.compile(r"transformers\..*\b(tokenization|processing|image_processing_pil)_.*")
"""Modules of classes that read files when they are made."""

_CLASS = re.compile(r"_*[A-Z][A-Za-z0-9_]{2,}|__pyx_unpickle_\w+")
"""A class, or the function by which Cython rebuilds an object of one; shorter names are modules: `F`, `NX`."""

_METHODS = words(
    "forward step _infer_parameters _lazy_load_hook _triangular_scale_fn _triangular2_scale_fn _linear_anneal "
    "_cosine_anneal"
)
"""Methods of such classes that checkpoints refer to."""

_TENSOR_METHOD = re.compile(r"torch\._C\.(_VariableFunctionsClass|TensorBase|_TensorBase)\._?[a-z]\w*")
"""Classes all of whose methods compute tensors, but for those that `denylist` has."""


_UFUNCS = (
    "abs absolute acos acosh add arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh "
    "bitwise_and bitwise_invert bitwise_not bitwise_or bitwise_xor cbrt ceil conj conjugate copysign cos cosh deg2rad "
    "degrees divide divmod equal exp exp2 expm1 fabs float_power floor floor_divide fmax fmin fmod greater "
    "greater_equal heaviside hypot invert isfinite isinf isnan left_shift less less_equal log log10 log1p log2 "
    "logaddexp logaddexp2 logical_and logical_not logical_or logical_xor matmul maximum minimum mod modf multiply "
    "negative not_equal positive pow power rad2deg radians reciprocal remainder right_shift rint sign signbit sin sinh "
    "sqrt square subtract tan tanh true_divide trunc"
)
_NUMPY = (
    "all any argmax argmin argsort array asarray average clip concatenate cumsum diff dot histogram linspace max mean "
    "median min nan_to_num nanmax nanmean nanmedian nanmin nanstd nansum ones percentile prod quantile ravel reshape "
    "round squeeze stack std sum transpose unique var where zeros amax amin finfo iinfo bool float int object str "
    "float_ int_ uint complex_ unicode_ string_ number integer floating generic inexact complexfloating "
    "signedinteger unsignedinteger character flexible clongfloat longfloat longcomplex cfloat singlecomplex ufunc "
    "ndindex ndenumerate broadcast"
)
_RECORDS = ("recarray", "record")
_FUNCTIONAL = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d affine_grid alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear "
    "binary_cross_entropy binary_cross_entropy_with_logits celu conv1d conv2d conv3d cosine_embedding_loss "
    "cosine_similarity cross_entropy ctc_loss dropout dropout1d dropout2d dropout3d elu embedding embedding_bag "
    "feature_alpha_dropout fold gaussian_nll_loss gelu glu grid_sample group_norm gumbel_softmax hardshrink "
    "hardsigmoid hardswish hardtanh hinge_embedding_loss huber_loss instance_norm interpolate kl_div l1_loss "
    "layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d margin_ranking_loss "
    "max_pool1d max_pool2d max_pool3d mish mse_loss multi_head_attention_forward multi_margin_loss "
    "multilabel_margin_loss multilabel_soft_margin_loss nll_loss normalize one_hot pad pairwise_distance pixel_shuffle "
    "pixel_unshuffle poisson_nll_loss prelu relu relu6 rms_norm rrelu scaled_dot_product_attention selu sigmoid silu "
    "smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign tanh tanhshrink threshold "
    "triplet_margin_loss triplet_margin_with_distance_loss unfold upsample upsample_bilinear upsample_nearest "
    "log_sigmoid"
)
_INIT = (
    "calculate_gain constant_ dirac_ eye_ kaiming_normal_ kaiming_uniform_ normal_ ones_ orthogonal_ sparse_ "
    "trunc_normal_ uniform_ xavier_normal_ xavier_uniform_ zeros_ kaiming_normal kaiming_uniform normal orthogonal "
    "uniform xavier_normal xavier_uniform constant"
)
_RETURNS = (
    "aminmax cummax cummin frexp geqrf histogram histogramdd kthvalue linalg_cholesky_ex linalg_eig linalg_eigh "
    "linalg_inv_ex linalg_lstsq linalg_lu linalg_qr linalg_slogdet linalg_svd lu_unpack max median min mode nanmedian "
    "qr slogdet sort svd topk triangular_solve"
)
_SPARSE = (
    "bsr_array bsr_matrix coo_array coo_matrix csc_array csc_matrix csr_array csr_matrix dia_array dia_matrix "
    "dok_array dok_matrix lil_array lil_matrix sparray spmatrix"
)
_SPARSE_MODULES = words("bsr coo csc csr dia dok lil base")
_SPECIAL = (
    "expit logit log_expit erf erfc erfinv ndtr ndtri gamma gammaln loggamma digamma beta betaln xlogy xlog1py entr "
    "rel_entr boxcox boxcox1p inv_boxcox inv_boxcox1p exp10 exp2 expm1 log1p cbrt"
)
_INTERPOLATED = " ".join(
    f"interp1d._call_{how}" for how in ("linear", "linear_np", "nearest", "previousnext", "spline")
)
_METRICS = (
    "accuracy_score adjusted_mutual_info_score adjusted_rand_score auc average_precision_score balanced_accuracy_score "
    "brier_score_loss calinski_harabasz_score completeness_score confusion_matrix cohen_kappa_score "
    "d2_absolute_error_score d2_pinball_score d2_tweedie_score davies_bouldin_score dcg_score explained_variance_score "
    "f1_score fbeta_score fowlkes_mallows_score hamming_loss hinge_loss homogeneity_score jaccard_score log_loss "
    "matthews_corrcoef max_error mean_absolute_error mean_absolute_percentage_error mean_gamma_deviance "
    "mean_pinball_loss mean_poisson_deviance mean_squared_error mean_squared_log_error mean_tweedie_deviance "
    "median_absolute_error mutual_info_score ndcg_score normalized_mutual_info_score precision_score r2_score "
    "rand_score recall_score roc_auc_score root_mean_squared_error root_mean_squared_log_error silhouette_score "
    "top_k_accuracy_score v_measure_score zero_one_loss additive_chi2_kernel chi2_kernel cosine_similarity "
    "euclidean_distances laplacian_kernel linear_kernel polynomial_kernel rbf_kernel sigmoid_kernel "
    "positive_likelihood_ratio negative_likelihood_ratio precision_recall_curve roc_curve"
)
_METRIC_MODULES = (
    "_classification _regression _ranking _scorer pairwise cluster._supervised cluster._unsupervised classification "
    "regression ranking scorer"
)
_SELECTION = "f_classif f_oneway f_regression chi2 r_regression mutual_info_classif mutual_info_regression"
_PANDAS = (
    "ArrowDtype BooleanDtype Categorical CategoricalDtype CategoricalIndex DataFrame DateOffset DatetimeIndex "
    "DatetimeTZDtype Float32Dtype Float64Dtype Flags Grouper Index Int16Dtype Int32Dtype Int64Dtype Int64Index "
    "Int8Dtype Interval IntervalDtype IntervalIndex MultiIndex NamedAgg Period PeriodDtype PeriodIndex RangeIndex "
    "Series SparseDtype StringDtype Timedelta TimedeltaIndex Timestamp UInt16Dtype UInt32Dtype UInt64Dtype UInt8Dtype"
)

KNOWN = frozenset(
    (
        *(f"torch.nn.functional.{name}" for name in _FUNCTIONAL.split()),
        *(f"torch._C._nn.{name}" for name in _FUNCTIONAL.split()),
        *_names("torch._C", "TensorBase _TensorBase _VariableFunctionsClass _VariableFunctions Generator"),
        *_names("torch.nn.init", _INIT),
        *_names("torch.return_types", _RETURNS),
        *_names("torch", "finfo iinfo ScriptObject"),
        *_names("torch.storage", "_LegacyStorage _TypedStorage _UntypedStorage"),
        *_names("torch._tensor", "Tensor _rebuild_from_type"),
        *_names("torch.tensor", "Tensor _rebuild_from_type"),
        *_names("torch._utils", "_rebuild_sparse_csr_tensor"),
        *_names("torch.nested._internal.nested_tensor", "_rebuild_njt"),
        *_names("torch._dynamo.decorators", "_DimRange"),
        *_names("torch.utils.hooks", "RemovableHandle"),
        *_names("torch.nn.backends.thnn", "_get_thnn_function_backend"),
        *_names("torch.distributed.checkpoint.filesystem", "_StorageInfo _StoragePrefix"),
        *_names(
            "torch.distributed.checkpoint.planner",
            "BytesIOWriteData LoadItemType LoadPlan ReadItem SavePlan TensorWriteData WriteItem WriteItemType",
        ),
        *_names("torch.distributed.remote_device", "_remote_device"),
        *_names("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        *_names("torch.distributed._shard.sharded_tensor.api", "ShardedTensor.ProcessGroupState"),
        *_names("torch.amp.grad_scaler", "_refresh_per_optimizer_state"),
        *_names("torch.cuda.amp.grad_scaler", "_refresh_per_optimizer_state"),
        *_names("torch.autograd", "Variable"),
        *_names("torch.autograd.variable", "Variable"),
        *_names("torch._C._distributed_c10d", "ReduceOp ReduceOp.RedOpType"),
        *_names("torch.utils.data.dataloader", "default_collate"),
        *_names("torch.utils.data._utils.collate", "default_collate default_convert"),
        *_names("numpy", f"{_UFUNCS} {_NUMPY}"),
        *(f"numpy.{core}.numeric.{name}" for core in ("core", "_core") for name in ("dtype", "array")),
        *(f"numpy.{core}.multiarray.ndarray" for core in ("core", "_core")),
        *(f"numpy.{core}._internal._convert_to_stringdtype_kwargs" for core in ("core", "_core")),
        *(f"numpy.{records}.{name}" for records in ("rec", "core.records", "_core.records") for name in _RECORDS),
        *_names("pandas", f"{_PANDAS} NA NaT"),
        *_names("pandas._libs.missing", "NA"),
        *_names("pandas.core.indexes.base", "_new_Index"),
        *_names("pandas.indexes.base", "_new_Index"),
        *_names("pandas.core.indexes.datetimes", "_new_DatetimeIndex"),
        *_names("pandas.core.indexes.period", "_new_PeriodIndex"),
        *_names("pandas.core.indexes.timedeltas", "_new_TimedeltaIndex"),
        *_names("pandas.core.indexes.interval", "_new_IntervalIndex"),
        *_names("dateutil.relativedelta", "relativedelta"),
        *_names("dateutil.tz.tz", "tzutc"),
        *_names("pytz", "_UTC _p"),
        *_names("pandas._libs.internals", "_unpickle_block"),
        *_names("pandas._libs.tslibs.timestamps", "_unpickle_timestamp"),
        *_names("pandas._libs.tslibs.timedeltas", "_timedelta_unpickle"),
        *_names("pandas._libs.tslibs.nattype", "__nat_unpickle"),
        *_names("pandas._libs.tslibs.nattype", "_nat_unpickle"),
        *(f"scipy.sparse.{name}" for name in _SPARSE.split()),
        *(
            f"scipy.sparse.{mark}{module}.{name}"
            for mark in ("", "_")
            for module in _SPARSE_MODULES
            for name in _SPARSE.split()
            if name.startswith(("sp", module))
        ),
        *_names("scipy.special", _SPECIAL),
        *_names("scipy.special._ufuncs", _SPECIAL),
        *_names("scipy.special._special_ufuncs", _SPECIAL),
        *_names("scipy.spatial._ckdtree", "cKDTree"),
        *_names("scipy.spatial.ckdtree", "cKDTree"),
        *_names("scipy.interpolate._interpolate", f"interp1d interp2d {_INTERPOLATED}"),
        *_names("scipy.interpolate.interpolate", f"interp1d interp2d {_INTERPOLATED}"),
        *_names("scipy.stats._kde", "gaussian_kde"),
        *_names("scipy.stats.kde", "gaussian_kde"),
        *_names("scipy.special._orthogonal", "orthopoly1d"),
        *(f"sklearn.metrics.{module}.{name}" for module in _METRIC_MODULES.split() for name in _METRICS.split()),
        *_names("sklearn.metrics", _METRICS),
        *_names("sklearn.metrics._scorer", "_passthrough_scorer"),
        *_names("sklearn.metrics.scorer", "_passthrough_scorer"),
        *_names("sklearn.feature_selection._univariate_selection", _SELECTION),
        *_names("sklearn.feature_selection.univariate_selection", _SELECTION),
        *_names("sklearn.feature_selection._mutual_info", _SELECTION),
        *(
            f"sklearn.{module}.newObj"
            for module in words(
                "neighbors._kd_tree neighbors._ball_tree neighbors.kd_tree neighbors.ball_tree neighbors._dist_metrics "
                "neighbors.dist_metrics metrics._dist_metrics"
            )
        ),
        *_names("scipy._lib.array_api_compat.numpy._aliases", "asarray"),
        *_names("sklearn.externals.joblib.numpy_pickle", "NumpyArrayWrapper NDArrayWrapper ZNDArrayWrapper"),
        *_names("joblib.numpy_pickle", "NumpyArrayWrapper NDArrayWrapper ZNDArrayWrapper"),
        *_names("joblib.numpy_pickle_compat", "NDArrayWrapper ZNDArrayWrapper"),
        *_names("sklearn.cluster._kmeans", "_kmeans_single_lloyd _kmeans_single_elkan"),
        *_names("torchmetrics.metric", "jit_distributed_available"),
        *_names("torchmetrics.utilities.distributed", "gather_all_tensors jit_distributed_available"),
        *_names("torchmetrics.utilities.data", "dim_zero_cat dim_zero_max dim_zero_mean dim_zero_min dim_zero_sum"),
        *_names("pytorch_lightning", "LightningModule"),
        *_names("omegaconf", "DictConfig ListConfig"),
        *_names("networkx", "Graph DiGraph MultiGraph MultiDiGraph"),
        *_names("networkx.classes.graph", "Graph"),
        *_names("omegaconf.base", "Node"),
        *_names("transformers.integrations.deepspeed", "HfDeepSpeedConfig HfTrainerDeepSpeedConfig"),
        *_names("transformers.deepspeed", "HfDeepSpeedConfig HfTrainerDeepSpeedConfig"),
        *_names("transformers.tokenization_utils_base", "BatchEncoding"),
        *_names("packaging.version", "Version"),
        *_names("packaging._structures", "InfinityType NegativeInfinityType"),
        *_names("tokenizers", "AddedToken Tokenizer"),
        *_names("regex._regex", "compile"),
        *_names("typing_extensions", "Annotated Literal"),
    )
)
"""Functions, and classes of other modules or with small letters, that ordinary checkpoints have."""


def is_data(module: str, name: str) -> bool:
    """True if a name of one of the packages only builds data."""
    full = f"{module}.{name}"
    if full in KNOWN or _TENSOR_METHOD.fullmatch(full):
        return True
    kind, dot, attribute = name.partition(".")
    if not _CLASS.fullmatch(kind) or _EXCEPT.fullmatch(kind):
        return False
    if dot and not (attribute in _METHODS or (attribute.isupper() and "." not in attribute)):
        return False
    if not f"{module}.".startswith(_BELOW) or _READING.fullmatch(module):
        return False
    return _APART.isdisjoint(module.split("."))
