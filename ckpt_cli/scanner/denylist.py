"""Names that run code, reach other files or the network, or open the way to names that do.

What picklescan, modelscan and fickling list is covered, and what their advisories added; the judgement of a name that
stands in no table is in `judge`.
"""

from __future__ import annotations

MODULES: dict[str, str] = {
    word: why
    for why, words in {
        "runs commands or talks to the system": (
            "os posix nt subprocess commands popen2 pty sys _posixsubprocess multiprocessing _multiprocessing "
            "_posixshmem signal _signal resource syslog msvcrt winreg _winreg _winapi pexpect sh plumbum paramiko "
            "fabric invoke psutil pipes _osx_support _aix_support _pyrepl"
        ),
        "runs code": (
            "code codeop runpy pdb bdb profile cProfile _lsprof hotshot trace timeit doctest unittest idlelib lib2to3 "
            "pydoc pydoc_data cmd sched concurrent _interpreters _xxsubinterpreters _testcapi _testinternalcapi "
            "threading _thread atexit IPython ipykernel test.support test.libregrtest test.regrtest "
            "test.__main__ cffi cython Cython numba.core jinja2 mako sympy numexpr antigravity this tkinter turtle "
            "turtledemo pandas.core.computation"
        ),
        "imports or compiles": (
            "importlib _frozen_importlib _frozen_importlib_external _imp imp zipimport pkgutil modulefinder site "
            "py_compile compileall marshal dis ast symtable inspect gc pkg_resources setuptools distutils "
            "_distutils_hack pip _pip ensurepip venv virtualenv zipapp"
        ),
        "loads pickles": "pickle _pickle cPickle pickletools dill cloudpickle joblib shelve jsonpickle hickle klepto",
        "calls native code": "ctypes _ctypes mmap",
        "talks to the network": (
            "socket _socket ssl _ssl http httplib urllib urllib2 urllib3 requests aiohttp httpx asyncio _asyncio "
            "webbrowser smtplib imaplib ftplib poplib telnetlib nntplib socketserver xmlrpc xmlrpclib "
            "SimpleXMLRPCServer select selectors wsgiref cgi cgitb boto boto3 botocore websocket websockets"
        ),
        "runs, fetches, moves or removes what it is given": (
            "huggingface_hub.utils._subprocess huggingface_hub.file_download huggingface_hub._snapshot_download "
            "huggingface_hub.hf_file_system huggingface_hub.repository huggingface_hub.keras_mixin "
            "huggingface_hub.fastai_utils huggingface_hub.cli huggingface_hub.commands mpmath.libmp.backend "
            "torch.distributed.flight_recorder torch.nn.attention._fa3 torch.nn.attention._fa4"
        ),
        "reads or writes files": (
            "shutil tempfile filecmp fileinput glob linecache tarfile zipfile sqlite3 _sqlite3 dbm gdbm bz2 gzip lzma "
            "fsspec smart_open fcntl termios"
        ),
        "gives out system facts or hidden helpers": "platform difflib uuid logging types",
        "reaches any attribute or function": "operator _operator functools _functools",
        "is how torch loads, compiles or runs code": (
            "torch.hub torch.package torch._dynamo torch._inductor torch.jit torch.onnx torch.compiler "
            "torch.utils.bottleneck torch.utils.collect_env torch.utils.cpp_extension torch.utils._config_module "
            "torch.utils.data.datapipes.utils.decoder torch.utils.model_zoo torch.utils.hipify "
            "torch.utils._cpp_extension_versioner "
            "torch.testing torch._export torch.export torch.fx.graph_module torch.fx._lazy_graph_module "
            "torch.fx._symbolic_trace torch.fx.experimental torch.multiprocessing torch.distributed.rpc "
            "torch.distributed.elastic torch.distributed.launcher torch.distributed.run torch.distributed.launch "
            "torch.distributed.nn.jit torch._appdirs torch._sources torch._classes torch._ops torch.backends._coreml "
            "torch.utils.benchmark torch.utils.file_baton torch.utils.viz torch.utils.tensorboard "
            "torch.cuda._memory_viz "
            "torch._functorch torch._library torch._custom_op torch._vendor torch.profiler._utils "
            "torch.distributed.checkpoint.format_utils torch.distributed._tools"
        ),
        "is how numpy loads, compiles or runs code": (
            "numpy.f2py numpy.testing numpy.distutils numpy.ctypeslib numpy._pytesttester numpy.lib.npyio "
            "numpy.lib._npyio_impl numpy.lib.format numpy.lib._format_impl numpy.lib._datasource numpy.lib.utils "
            "numpy.compat numpy.conftest numpy.core.memmap numpy._core.memmap"
        ),
    }.items()
    for word in words.split()
}
"""Modules of which nothing, but for what `harmless` names, belongs into a checkpoint; with what they do."""

NAMES: dict[str, str] = {
    word: why
    for why, words in {
        "runs code": (
            "torch.fx.graph_module.reduce_graph_module torch.jit.unsupported_tensor_ops.execWrapper torch.compile "
            "pandas.eval pandas.core.computation.eval.eval pandas.DataFrame.eval pandas.DataFrame.query "
            "pandas.core.frame.DataFrame.eval pandas.core.frame.DataFrame.query scipy.weave.inline "
            "sklearn.utils._testing.assert_run_python_script tensorflow.py_function tensorflow.numpy_function "
            "dataclasses.make_dataclass dataclasses._create_fn collections.namedtuple typing.get_type_hints "
            "torch._utils._import_dotted_name torch.fx.operator_schemas._torchscript_type_to_python_type "
            "torch.cuda.memory.CUDAPluggableAllocator torch.cuda.CUDAPluggableAllocator "
            "scipy.stats._distn_infrastructure.rv_generic "
            "typing.ForwardRef._evaluate annotationlib.ForwardRef.evaluate pyparsing.testing "
            "numpy.core._internal._ctypes numpy._core._internal._ctypes"
        ),
        "loads pickles or models": (
            "torch.load torch.save torch.serialization.load torch.serialization.save torch.serialization._load "
            "torch.serialization._legacy_load torch.serialization.add_safe_globals "
            "torch.distributed.distributed_c10d._tensor_to_object torch.distributed.distributed_c10d._object_to_tensor "
            "torch.serialization.set_default_load_endianness torch.storage._load_from_bytes numpy.load numpy.save "
            "numpy.savez numpy.fromfile numpy.tofile numpy.memmap numpy.genfromtxt numpy.loadtxt numpy.savetxt "
            "numpy.DataSource pandas.read_pickle pandas.io.pickle.read_pickle pandas.to_pickle "
            "pandas.compat.pickle_compat.load scipy.io.loadmat keras.models.load_model "
            "keras.saving.load_model keras.src.saving.saving_api.load_model keras.layers.Lambda "
            "keras.src.layers.core.lambda_layer.Lambda keras.utils.get_file tensorflow.keras.models.load_model "
            "tensorflow.keras.layers.Lambda tensorflow.saved_model.load tensorflow.io.read_file "
            "tensorflow.io.write_file tensorflow.load_op_library tensorflow.load_library yaml.load yaml.unsafe_load "
            "yaml.full_load ruamel.yaml.load torch.distributed.checkpoint.load "
            "torch.distributed.checkpoint.state_dict_loader.load "
            "huggingface_hub.hf_hub_download huggingface_hub.snapshot_download "
            "transformers.dynamic_module_utils.get_class_from_dynamic_module "
            "transformers.utils.hub.cached_file keras.src.saving.saving_lib.load_model "
            "keras.src.saving.keras_saveable.KerasSaveable._unpickle_model keras.config.enable_unsafe_deserialization "
            "keras.src.utils.file_utils.get_file keras.src.saving.serialization_lib.enable_unsafe_deserialization "
            "mlflow.pyfunc.load_model mlflow.pytorch.load_model mlflow.sklearn.load_model skops.io.load skops.io.loads "
            "nltk.download nltk.data.load nltk.downloader.download monai.bundle.ConfigParser monai.bundle.run "
            "monai.bundle.load hydra.utils.instantiate hydra.utils.call "
            "hydra._internal.instantiate._instantiate2.instantiate "
            "hydra.utils.get_method hydra.utils.get_class gensim.utils.unpickle "
            "onnxruntime.InferenceSession spacy.load "
            "onnxruntime.capi.onnxruntime_inference_collection.InferenceSession datasets.load_dataset"
        ),
        "reads or writes files": (
            "io.open io.FileIO io.open_code io.OpenWrapper _io.open _io.FileIO _io.open_code _pyio.open _pyio.FileIO "
            "codecs.open pathlib.Path.open pathlib.Path.read_text pathlib.Path.read_bytes pathlib.Path.write_text "
            "pathlib.Path.write_bytes pathlib.Path.unlink pathlib.PosixPath.open pathlib.PosixPath.write_text "
            "pathlib.PosixPath.write_bytes pathlib.PosixPath.unlink torch.from_file "
            "torch.UntypedStorage.from_file torch._C.PyTorchFileReader torch._C.PyTorchFileWriter "
            "torch.classes.load_library torch.ops.load_library "
            "torch._C._VariableFunctions.from_file torch._C._VariableFunctionsClass.from_file "
            "torch.storage.UntypedStorage.from_file torch.storage.TypedStorage.from_file safetensors.torch.save_file "
            "safetensors.numpy.save_file safetensors.serialize_file safetensors._safetensors_rust.serialize_file"
        ),
    }.items()
    for word in words.split()
}
"""Single names of modules that have others which do no harm."""

ANYWHERE = frozenset(
    [
        "eval",
        "exec",
        "execfile",
        "system",
        "popen",
        "Popen",
        "exec_",
        "check_output",
        "check_call",
        "run_subprocess",
        "sympify",
        "load_library",
        "getoutput",
        "getstatusoutput",
        "import_module",
        "__import__",
        "load_module",
        "exec_module",
        "run_path",
        "run_module",
        "runcode",
        "runsource",
    ]
)
"""Names that say what they do, whatever the module."""

INNER = frozenset(
    [
        "__globals__",
        "__builtins__",
        "__subclasses__",
        "__import__",
        "__loader__",
        "__spec__",
        "__dict__",
        "__class__",
        "__base__",
        "__bases__",
        "__mro__",
        "__code__",
        "__closure__",
        "__getattribute__",
        "__getattr__",
        "__setattr__",
        "__delattr__",
        "__call__",
        "__func__",
        "__self__",
        "__reduce__",
        "__reduce_ex__",
        "__init_subclass__",
        "__wrapped__",
        "__defaults__",
        "__kwdefaults__",
        "__get__",
        "f_globals",
        "f_builtins",
        "gi_frame",
        "tb_frame",
        "f_back",
    ]
)
"""Attributes by which a harmless object leads to any other."""

LEADS_TO = frozenset(
    [
        "os",
        "sys",
        "posix",
        "nt",
        "subprocess",
        "commands",
        "pty",
        "socket",
        "shutil",
        "importlib",
        "builtins",
        "ctypes",
        "pickle",
        "cPickle",
        "marshal",
        "runpy",
        "pdb",
        "bdb",
        "multiprocessing",
        "tempfile",
        "zipimport",
        "pkgutil",
        "webbrowser",
        "asyncio",
        "threading",
        "urllib",
        "inspect",
    ]
)
"""Modules that other modules hand out as an attribute: `pathlib` `os.system` is `os.system`."""

ALIASES = {
    "np": "numpy",
    "onp": "numpy",
    "pd": "pandas",
    "th": "torch",
    "hub": "torch.hub",
    "serialization": "torch.serialization",
    "cpp_extension": "torch.utils.cpp_extension",
    "tf": "tensorflow",
    "mp": "multiprocessing",
}
"""Names by which modules are held that are not their own."""
