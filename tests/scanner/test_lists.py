"""Every name that picklescan, modelscan and fickling document is an error, and what torch allows is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.pickles import call, named
from builders.pt import write
from scanning import codes, scanned, stacked
from torch._weights_only_unpickler import _get_allowed_globals

from ckpt_cli.dtypes import BY_STORAGE
from ckpt_cli.ops.scan import scan
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.scanner.allowlist import ALLOWED
from ckpt_cli.scanner.judge import judge


def test_what_torch_allows_is_what_our_table_allows() -> None:
    assert set(_get_allowed_globals()) == ALLOWED


@pytest.mark.parametrize(
    ("module", "name", "verdict"),
    [
        ("torch._utils", "_rebuild_tensor_v2", "allowed"),
        ("__builtin__", "set", "allowed"),
        ("copy_reg", "_reconstructor", "harmless"),
        ("exceptions", "ValueError", "harmless"),
        ("uuid", "UUID", "harmless"),
        ("lab.models", "Net", "unknown"),
        ("code.models", "Net", "unknown"),
        ("test.models", "Net", "unknown"),
        ("__main__", "Net", "unknown"),
        ("__torch__.lab", "Net", "harmless"),
        ("__torch__evil", "run", "unknown"),
        ("wave", "open", "unusual"),
        ("collections", "_sys", "dangerous"),
        ("lab.models", "os.system", "dangerous"),
        ("lab.models", "Net.__init__.__globals__", "dangerous"),
        ("torch", "serialization.load", "dangerous"),
        ("torch.storage", "os", "dangerous"),
        ("commands", "getoutput", "dangerous"),
        ("a" * 10_000, "b", "dangerous"),
        ("lab", "a." * 200 + "b", "dangerous"),
    ],
)
def test_a_name_is_judged(module: str, name: str, verdict: str) -> None:
    assert judge(module, name).verdict == verdict


# --- what picklescan, modelscan and fickling document -----------------------------------------------------------------

DOCUMENTED = """
__builtin__ eval|__builtin__ compile|__builtin__ getattr|__builtin__ apply|__builtin__ exec|__builtin__ open
__builtin__ breakpoint|__builtin__ __import__|builtins eval|builtins compile|builtins getattr|builtins apply
builtins exec|builtins open|builtins breakpoint|builtins __import__|builtins globals|builtins setattr|builtins vars
builtins eval.__call__|builtins input|os system|nt system|posix system|subprocess run|subprocess Popen|sys exit
socket create_connection|pickle loads|_pickle loads|cPickle loads|runpy _run_code|runpy run_path|bdb Bdb|bdb Bdb.run
pdb run|shutil rmtree|asyncio run|asyncio.unix_events _UnixSubprocessTransport._start|webbrowser open
httplib HTTPSConnection|http.client HTTPSConnection|requests.api get|aiohttp.client ClientSession|aiohttp ClientSession
operator attrgetter|operator itemgetter|operator methodcaller|_operator attrgetter|_operator methodcaller
functools reduce|cloudpickle.cloudpickle _builtin_type|cloudpickle.cloudpickle _make_function
cloudpickle.cloudpickle _function_setstate|cloudpickle.cloudpickle _make_cell|cloudpickle.cloudpickle subimport
types CodeType|types FunctionType|commands getoutput|ctypes CDLL|_ctypes dlopen|logging FileHandler|io FileIO|_io FileIO
_io open|io open|numpy.f2py.crackfortran getlincoef|numpy.f2py.crackfortran _eval_length
numpy.testing._private.utils runstring|ssl get_server_certificate|code InteractiveInterpreter.runcode
codeop compile_command
cProfile run|cProfile runctx|profile run|profile Profile.run|profile Profile.runctx|distutils.file_util write_file
doctest debug_script|ensurepip _run_pip|idlelib.autocomplete AutoComplete.get_entity
idlelib.autocomplete AutoComplete.fetch_completions|idlelib.calltip Calltip.fetch_tip|idlelib.calltip get_entity
idlelib.debugobj ObjectTreeItem.SetText|idlelib.pyshell ModifiedInterpreter.runcode
idlelib.pyshell ModifiedInterpreter.runcommand|idlelib.run Executive.runcode|imaplib IMAP4_stream
lib2to3.pgen2.grammar Grammar.loads|lib2to3.pgen2.pgen ParserGenerator.make_label|pip main|pip._internal main
pkgutil resolve_name|pty spawn|pydoc pipepager|pydoc locate|test.support.script_helper assert_python_ok|timeit timeit
torch._dynamo.guards GuardBuilder.get|torch._inductor.codecache compile_file
torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression|torch.jit.unsupported_tensor_ops execWrapper
torch.serialization load|torch load|torch compile|torch.hub load|torch.utils._config_module ConfigModule.load_config
torch.utils.bottleneck.__main__ run_cprofile|torch.utils.bottleneck.__main__ run_autograd_prof
torch.utils.collect_env run|torch.utils.collect_env run_and_read_all
torch.utils.data.datapipes.utils.decoder basichandlers|torch.distributed.elastic.rendezvous.api basichandlers
trace Trace.run|trace Trace.runctx|urllib.request urlopen|urllib2 urlopen|urllib urlretrieve|uuid _get_command_stdout
venv create|_osx_support _read_output|_osx_support _find_build_tool|_aix_support _read_cmd_output
_pyrepl.pager pipe_pager|_pyrepl.pager tempfile_pager|multiprocessing.util spawnv_passfds|_posixsubprocess fork_exec
marshal loads|_interpreters create|_xxsubinterpreters create|importlib import_module|_frozen_importlib _gcd_import
_frozen_importlib_external FileLoader|_imp load_dynamic|imp load_source|zipimport zipimporter|gc get_objects|site main
unittest main|inspect getattr_static|smtplib SMTP|ftplib FTP|poplib POP3|telnetlib Telnet|nntplib NNTP|dill loads
joblib load|joblib.numpy_pickle load|tempfile mkstemp|filecmp cmp|pexpect run|pipes Template|socketserver TCPServer
xmlrpc.client ServerProxy|signal signal|_signal alarm|threading Thread|_thread start_new_thread|atexit register
sqlite3 connect|_sqlite3 connect|fileinput input|glob glob|platform popen|linecache getlines|difflib SequenceMatcher
compileall compile_dir|py_compile compile|mmap mmap|select select|selectors DefaultSelector|syslog syslog|tarfile open
zipfile ZipFile|shelve open|numpy.distutils exec_command|pathlib os.system|numpy load|keras.models load_model
pandas read_pickle|torch.fx.graph_module reduce_graph_module|torch.package PackageImporter|_testcapi run_in_subinterp
"""
NAMES = [pair for row in DOCUMENTED.split("\n") for pair in row.split("|") if pair]


@pytest.mark.parametrize("pair", NAMES)
def test_every_documented_name_is_an_error(tmp_path: Path, pair: str) -> None:
    found = scanned(tmp_path / "m.pkl", stacked(*pair.split(), "id"))
    assert "dangerous-global" in codes(found, "error")
    assert not found.ok


def test_every_documented_name_is_one_in_torchs_zip_too(tmp_path: Path) -> None:
    calls = [call(named(pair.replace(" ", ".")), "id") for pair in NAMES if "." not in pair.split()[1]]
    found = scan(str(write(tmp_path / "m.pt", {"weights": calls})))
    harmful = [finding for finding in found.findings if finding.code == "dangerous-global"]
    assert len(harmful) == len({pair for pair in NAMES if "." not in pair.split()[1]})


@pytest.mark.parametrize("names", [{**CALLS}, {("torch", f"{kind}Storage"): None for kind in BY_STORAGE}])
def test_no_name_that_makes_tensors_is_dangerous(names: dict[tuple[str, str], object]) -> None:
    """So that a pickle which names nothing else needs no judgement when it is opened."""
    assert [name for name in names if judge(*name).verdict == "dangerous"] == []


def test_a_state_dict_is_listed_without_the_scanner_and_a_dangerous_pickle_with_a_warning(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    write(tmp_path / "bad.pt", {"a": call("os.system", "true")}, {})
    says = "print('ckpt_cli.scanner.judge' in sys.modules)"
    code = f"import sys; from ckpt_cli.cli.main import run; run(sys.argv[1:]); {says}"
    for name, judged in (("good.pt", "False"), ("bad.pt", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code, "ls", tmp_path / name], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == judged
        assert ("would run os.system" in done.stderr) == (judged == "True")
