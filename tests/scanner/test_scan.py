"""`ckpt scan`: everything that the three scanners document is flagged, nothing in an ordinary checkpoint is."""

from __future__ import annotations

import argparse
import bz2
import collections
import datetime
import decimal
import enum
import functools
import gzip
import io
import json
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import Ops, built, call, get, named, new, persistent, pickled, put, value
from builders.pt import DEFLATED, Record, archive, torch_records, write
from conftest import Ckpt
from torch._weights_only_unpickler import _get_allowed_globals

from ckpt_cli import limits
from ckpt_cli.ops.scan import Scan, scan
from ckpt_cli.scanner.allowlist import ALLOWED
from ckpt_cli.scanner.judge import judge

HARMFUL = pickled(call("os.system", "echo hi"))


def stacked(module: str, name: str, *args: Any) -> bytes:
    """A protocol-4 pickle that calls a name, dots and all."""
    func = Ops(value(module) + value(name) + b"\x93")
    return pickled(Ops(func + value(args) + b"R"), 4)


def scanned(path: Path, content: bytes) -> Scan:
    path.write_bytes(content)
    return scan(str(path))


def codes(found: Scan, *severities: str) -> set[str]:
    return {finding.code for finding in found.findings if finding.severity in (severities or ("error", "warning"))}


# --- the judgement ----------------------------------------------------------------------------------------------------


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


PROTOCOL0 = b"(S'raise RuntimeError(\"hi\")'\ni__builtin__\nexec\n."
SOUR = (
    b"c__builtin__\nglobals\n(tRp100\n0c__builtin__\ncompile\n(S'x=1'\nS''\nS'exec'\ntRp101\n0c__builtin__\neval\n"
    b"(g101\ng100\ntRp102\n0c__builtin__\ngetattr\n(c__builtin__\ndict\nS'get'\ntRp103\n0c__builtin__\napply\n"
    b"(g103\n(g100\nS'x'\nltRp104\n0g104\n."
)
MEMO = b"Vos\np2\n0Vsystem\np3\n0Vtorch\np0\n0VLongStorage\np1\n0g2\ng3\n\x93(Vcat flag.txt\ntR."
"""Names that only the memo knows."""
NO_CALL = b"\x80\x04cos\nsystem\n."

EVASIONS: dict[str, bytes] = {
    "inst": PROTOCOL0,
    "sour-pickles": SOUR,
    "memo": MEMO,
    "memo-and-junk": MEMO + b"\n\n\t\t",
    "obj": b"(cos\nsystem\nVid\no.",
    "obj-dropped": b"(cos\nsystem\nVid\no0N.",
    "newobj": pickled(new("subprocess.Popen", "id")),
    "reduce-dropped": pickled(Ops(call("os.system", "id") + b"0N")),
    "name-only": NO_CALL,
    "breaks-after": b"\x80\x02cos\nsystem\nX\2\0\0\0id\x85R\xff",
    "ends-after": b"\x80\x02cos\nsystem\nX\2\0\0\0id\x85R",
    "missing-memo": b"\x80\x04cos\nsystem\n\x8c\x02os\x94h\x03h\x00\x93X\2\0\0\0id\x85R.",
    "name-is-a-number": b"\x80\x04cos\nsystem\nK\x2a\x94\x8c\x02os\x94h\x00h\x01\x93.",
    "computed-name": b"\x80\x04cbuiltins\nstr\nX\2\0\0\0os\x85R\x8c\x06system\x93X\2\0\0\0id\x85R.",
    "binary-strings": b"U\x02osU\x06system\x93U\x02ls\x85R.",
    "leading-zero-integer": b"I010\n0cos\nsystem\n(VidtR.",
    "mark-left-open": b"\x80\x02(cos\nsystem\nX\2\0\0\0id\x85R.",
    "values-left": b"\x80\x02NNcos\nsystem\nX\2\0\0\0id\x85R.",
    "protocol-9": b"\x80\x09cos\nsystem\nX\2\0\0\0id\x85R.",
    "mixed-memo": b"\x80\x04Np9\n0\x8c\x02os\x94\x8c\x06system\x94\x93X\2\0\0\0id\x85R.",
    "second-stream": pickle.dumps(["a", "b"]) + HARMFUL,
    "second-stream-protocol-0": pickle.dumps(["a"]) + b"cos\nsystem\n(Vid\ntR.",
    "after-junk": pickle.dumps(["a"]) + b"junk" * 5 + HARMFUL,
    "nested-bytes": pickled(call("pickle.loads", HARMFUL)),
    "nested-unloaded": pickled({"x": HARMFUL}),
    "nested-twice": pickled({"x": pickled([HARMFUL])}),
    "nested-latin": pickled({"x": call("_codecs.encode", HARMFUL.decode("latin-1"), "latin1")}),
    "nested-long": pickled({"x": pickled(["y" * 100_000, call("os.system", "id")])}),
    "nested-load": pickled(call("torch.storage._load_from_bytes", HARMFUL)),
    "nested-load-of-junk": pickled(call("torch.storage._load_from_bytes", b"junk")),
    "getattr-chain": pickled(call("builtins.getattr", call("builtins.__import__", "os"), "system")),
    "getattr-of-module": pickled(call(call("builtins.getattr", named("torch.storage"), "os"), "x")),
    "getattr-computed": pickled(call("builtins.getattr", call("lab.f"), "system")),
    "getattr-handed-on": pickled(call("lab.apply", named("builtins.getattr"), "x")),
    "getattr-dunder": pickled(call("builtins.getattr", named("lab.Net"), "__globals__")),
    "getattr-dotted": pickled(call("builtins.getattr", named("lab.Net"), "a.b")),
    "partial-of-load": pickled(call(call("functools.partial", named("torch.load"), "x"))),
    "partial-of-getattr": pickled(call("functools.partial", named("builtins.getattr"), named("lab.Net"))),
    "partial-called": pickled(call(call("functools.partial", named("lab.f")))),
    "partial-by-state": pickled(built(call("functools.partial", named("lab.f")), (call("lab.g"), (), {}, None))),
    "extension": pickled(Ops(b"\x82\x07" + value(()) + b"R")),
    "class-patched": pickled(built(named("torch.nn.Linear"), {"forward": named("lab.f")})),
    "items-of-a-module": pickled(Ops(named("lab.registry") + b"(X\1\0\0\0aK\1u")),
    "attribute-patched": pickled(built(call("builtins.getattr", named("lab.Net"), "inner"), {"a": 1})),
    "persistent-id": pickled(persistent(("storage", named("os.system"), "0", "cpu", 1))),
    "call-of-a-call": pickled(call(call("lab.f"), "x")),
    "build-in-rebuild": pickled(
        call("torch._tensor._rebuild_from_type_v2", named("os.system"), named("lab.T"), ("id",), None)
    ),
    "gzip": gzip.compress(HARMFUL),
    "bzip2": bz2.compress(HARMFUL),
    "zlib": zlib.compress(HARMFUL),
    "7z": b"7z\xbc\xaf\x27\x1c" + bytes(30),
    "zstandard": b"\x28\xb5\x2f\xfd" + bytes(30),
    "magic-by-eval": pickled(call("builtins.eval", "0x1950A86A20F9469CFC6C")) + HARMFUL,
    "hdf5-lambda": b"\x89HDF\r\n\x1a\n" + bytes(50) + b'{"class_name": "Lambda", "config": {}}',
}


@pytest.mark.parametrize("name", EVASIONS)
def test_no_evasion_goes_unseen(tmp_path: Path, name: str) -> None:
    found = scanned(tmp_path / "m.pkl", EVASIONS[name])
    assert not found.ok
    assert codes(found)


@pytest.mark.parametrize("name", [name for name in EVASIONS if EVASIONS[name].find(b"cos\nsystem\n") >= 0])
def test_os_system_is_named_wherever_it_hides(tmp_path: Path, name: str) -> None:
    found = scanned(tmp_path / "m.pkl", EVASIONS[name])
    assert any(f.severity == "error" and "os.system" in f.message for f in found.findings)


def test_the_call_is_told(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.pkl", HARMFUL)
    assert found.findings[0].message == "os.system('echo hi'): os runs commands or talks to the system"


# --- containers -------------------------------------------------------------------------------------------------------

HARMLESS = pickled({"a": 1})


def plain(**changes: Any) -> list[Record]:
    return torch_records(HARMLESS, {"0": bytes(64)}, **changes)


def pt(records: list[Record]) -> bytes:
    return archive(records)


def _renamed_in_directory() -> bytes:
    return pt([Record("archive/datap.kl", HARMFUL, local_name="archive/data.pkl"), *plain()[1:]])


def _unlisted() -> bytes:
    whole = bytearray(pt([*plain()[:-1], Record("archive/evil.pkl", HARMFUL), plain()[-1]]))
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        start = file.start_dir
    at = whole.index(b"PK\1\2", whole.index(b"evil.pkl", start) - 60)
    end = whole.index(b"PK\1\2", at + 4)
    entry = bytes(whole[at:end])
    del whole[at:end]
    tail = whole.index(b"PK\6\6", start)
    count, size = struct.unpack_from("<Q", whole, tail + 32)[0], struct.unpack_from("<Q", whole, tail + 40)[0]
    struct.pack_into("<3Q", whole, tail + 24, count - 1, count - 1, size - len(entry))
    place = whole.index(b"PK\6\7", tail)
    struct.pack_into("<Q", whole, place + 8, tail)
    return bytes(whole)


def _npy(content: bytes, descr: bytes = b"|O") -> bytes:
    header = b"{'descr': '%s', 'fortran_order': False, 'shape': (1,), }" % descr
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


_NUMBERS = _npy(b"\7", b"|u1")
"""An array of one number."""


CONTAINERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "data.pkl": (lambda: pt(torch_records(HARMFUL)), "dangerous-global"),
    "second data.pkl": (lambda: pt([*plain(), Record("archive/data.pkl", HARMFUL)]), "duplicate-record"),
    "data.pkl elsewhere": (lambda: pt([*plain(), Record("archive/x/data.pkl", HARMFUL)]), "misplaced-pickle"),
    "data.pkl of another prefix": (lambda: pt([*plain(), Record("other/data.pkl", HARMFUL)]), "outside-prefix"),
    "another pickle": (lambda: pt([*plain(), Record("archive/evil.pkl", HARMFUL)]), "extra-pickle"),
    "a storage that is a pickle": (lambda: pt([*plain(), Record("archive/data/1", HARMFUL)]), "dangerous-global"),
    "wrong crc": (lambda: pt([Record("archive/data.pkl", HARMFUL, crc=7), *plain()[1:]]), "wrong-crc"),
    "wrong flags": (lambda: pt([Record("archive/data.pkl", HARMFUL, flags=0x809), *plain()[1:]]), "header-mismatch"),
    "flag 0x20": (lambda: pt([Record("archive/data.pkl", HARMFUL, flags=0x828), *plain()[1:]]), "header-mismatch"),
    "flag 0x40": (lambda: pt([Record("archive/data.pkl", HARMFUL, flags=0x848), *plain()[1:]]), "header-mismatch"),
    "other name": (_renamed_in_directory, "header-mismatch"),
    "other method": (
        lambda: pt([Record("archive/data.pkl", HARMFUL, local_method=8), *plain()[1:]]),
        "header-mismatch",
    ),
    "unlisted": (_unlisted, "unlisted-record"),
    "deflated": (lambda: pt([Record("archive/data.pkl", HARMFUL, DEFLATED), *plain()[1:]]), "dangerous-global"),
    "junk before": (lambda: HARMFUL + pt(plain()), "trailing-data"),
    "a pickle, then a deflated zip": (
        lambda: HARMLESS + pt([Record("archive/data.pkl", HARMFUL, DEFLATED), *plain()[1:]]),
        "two-formats",
    ),
    "junk after": (lambda: pt(plain()) + HARMFUL, "trailing-data"),
    "zip in a zip": (lambda: pt([Record("a/b", pt(torch_records(HARMFUL)))]), "dangerous-global"),
    "two zips": (lambda: pt(torch_records(HARMFUL)) + pt(plain()), "several-zips"),
    "no end record": (lambda: pt(torch_records(HARMFUL))[:300], "broken-zip"),
    "objects of numpy": (lambda: _npy(HARMFUL), "dangerous-global"),
    "objects of numpy after numbers": (lambda: _NUMBERS * 2 + _npy(HARMFUL), "dangerous-global"),
    "objects of numpy after JSON": (lambda: b'{"a": 1}\n' + _NUMBERS + _npy(HARMFUL), "dangerous-global"),
    "after an array": (lambda: _NUMBERS + HARMFUL, "hidden-pickle"),
    "objects in npz": (lambda: pt([Record("a.npy", _npy(HARMFUL))]), "dangerous-global"),
    "keras": (lambda: pt([Record("config.json", b'{"class_name": "Lambda"}')]), "keras-lambda"),
    "broken and deflated": (lambda: pt([Record("a/data.pkl", HARMFUL, DEFLATED, data=b"\xff\xff")]), "not-searched"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_container_hides_a_pickle(tmp_path: Path, name: str) -> None:
    make, code = CONTAINERS[name]
    found = scanned(tmp_path / "m.pt", make())
    assert code in codes(found)
    if b"os\nsystem" in make() and name not in ("no end record",):
        assert any("os.system" in finding.message for finding in found.findings)


def test_a_deflated_zip_behind_a_pickle_is_opened(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.pt", CONTAINERS["a pickle, then a deflated zip"][0]())
    assert any("os.system" in finding.message for finding in found.findings)


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _storages(last: bytes = pickled([])) -> bytes:
    entry = pickled(("0", "cpu", named("torch.FloatStorage"))) + struct.pack("<q", 2) + bytes(8)
    return pickled(1) + entry + last


def test_a_tar_of_torch_is_followed_through_its_storages(tmp_path: Path) -> None:
    tensor = pickled(("1", "0", named("torch.FloatTensor"))) + struct.pack("<ii3q", 1, 0, 2, 1, 0)
    members = {"storages": _storages(), "tensors": pickled(1) + tensor, "pickle": HARMLESS}
    found = scanned(tmp_path / "m.pt", _tar(members))
    assert (found.ok, found.pickles) == (True, 6)
    for name in members:
        bad = members | {name: _storages(HARMFUL) if name == "storages" else members[name] + HARMFUL}
        assert "dangerous-global" in codes(scanned(tmp_path / "m.pt", _tar(bad)))


def test_a_legacy_stream_is_followed_beyond_its_storages(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(
        {"w": torch.arange(1000.0), "i": torch.ones(3, dtype=torch.int64)}, path, _use_new_zipfile_serialization=False
    )
    whole = path.read_bytes()
    assert (scan(str(path)).ok, scan(str(path)).pickles) == (True, 5)
    assert "extra-stream" in codes(scanned(path, whole + HARMFUL))
    assert "extra-stream" in codes(scanned(path, whole + whole))
    assert "trailing-data" in codes(scanned(path, whole + b"junk"))
    assert "odd-storages" in codes(scanned(path, whole[:-4]))
    assert "dangerous-global" in codes(scanned(path, whole + b"junk" + HARMFUL))


def test_a_directory_and_an_index_are_scanned_file_by_file(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "vocab.txt").write_text("cat\ndog\nmouse\n")
    (folder / "README.md").write_text("N.B. this is no pickle\n")
    write(folder / "a.bin", HARMLESS)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.bin", "y": "b.bin"}}))
    assert codes(scan(str(index))) == {"missing-shard"}
    assert scan(str(folder)).ok
    write(folder / "b.bin", HARMFUL)
    for path in (index, folder):
        answer = ckpt("scan", "--json", path)
        assert answer.code == 1
        assert json.loads(answer.out)["findings"][0]["where"] == "b.bin/archive/data.pkl"
    index.write_text(json.dumps({"weight_map": {"x": "../b.bin"}}))
    assert codes(scan(str(index))) == {"outside-folder"}


# --- ordinary checkpoints ---------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 0


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        self.act = torch.nn.functional.gelu
        self.colour = Colour.RED

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _training() -> dict[str, Any]:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.LSTM(8, 2))
    adam = torch.optim.AdamW(net.parameters())
    net[0](torch.zeros(2, 4)).sum().backward()
    adam.step()
    return {
        "state_dict": net.state_dict(),
        "optimizer_states": [adam.state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.StepLR(adam, 3).state_dict()],
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best": pathlib.PurePosixPath("a/b"), "score": torch.tensor(1.0)}
        },
        "hyper_parameters": argparse.Namespace(lr=0.1, when=datetime.datetime(2026, 1, 1), level=Level.LOW),
        "rng": (
            torch.get_rng_state(),
            np.random.default_rng(0),
            np.random.RandomState(0).get_state(),
            random.getstate(),
        ),
        "numpy": [np.arange(100), np.float64(3), np.array([{}, None], dtype=object), np.zeros(2, dtype="f4,i8")],
        "containers": [collections.defaultdict(list), collections.Counter("ab"), collections.deque([1]), {1, 2}],
        "numbers": [decimal.Decimal(1), 1 + 2j, 10**50, b"\x80\x02 not a pickle", "code\nof\na model."],
        "net": Net(),
        "dtypes": [torch.float8_e4m3fn, torch.strided, torch.device("cpu"), torch.Size([1])],
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated, and in files none the less
        return _training()


@pytest.mark.parametrize("protocol", range(6))
def test_a_training_checkpoint_of_any_protocol_is_clean(
    tmp_path: Path, training: dict[str, Any], protocol: int
) -> None:
    torch.save(training, tmp_path / "m.pt", pickle_protocol=protocol)
    assert codes(scan(str(tmp_path / "m.pt"))) == set()
    if protocol:  # torch writes what it cannot load itself by protocol 0
        torch.save(training, tmp_path / "l.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        assert codes(scan(str(tmp_path / "l.pt"))) == set()
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(training, protocol=protocol))
    assert codes(scan(str(tmp_path / "b.pkl"))) == set()


@pytest.mark.parametrize("protocol", [2, 3])
def test_an_enum_of_python_3_11_0_and_a_nested_class_are_notes_at_most(tmp_path: Path, protocol: int) -> None:
    owner = named("lab.Colour")
    function = put(0, named("builtins.getattr"))
    root = [call(function, owner, "RED"), call(get(0), owner, "BLUE"), new(call(get(0), owner, "Inner"))]
    found = scanned(tmp_path / "m.pkl", pickled(root, protocol))
    assert found.ok
    assert codes(found, "note") == {"unknown-global"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torch_writes_elsewhere_is_clean(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 3), torch.zeros(1, 3)), tmp_path / "ts.pt")
    torch.save(torch.nn.Linear(3, 3), tmp_path / "module.pt")
    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.array([None, 1], dtype=object))
    np.save(tmp_path / "O.npy", np.zeros(3))
    tensors = {"u": torch.frombuffer(bytearray(b"\x80\x02" + bytes(range(200))), dtype=torch.uint8)}
    torch.save(tensors, tmp_path / "chance.pt")
    for path in tmp_path.iterdir():
        assert codes(scan(str(path))) == set(), path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_saved_in_parts_is_clean(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"net": Net().state_dict(), "epoch": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = scan(str(tmp_path / "dcp"))
    assert codes(found) == set()
    assert found.pickles > 3


# --- the command ------------------------------------------------------------------------------------------------------


def test_scan_says_yes_to_the_samples(work: Path, ckpt: Ckpt) -> None:
    for path in ("mlp.pt", "tied.pt", "train.pt", "tied.safetensors"):
        answer = ckpt("scan", path)
        assert answer.code == 0
        assert all(line.startswith("note\tunknown-global\t") for line in answer.lines)


def test_scan_says_no_and_nothing_is_run(tmp_path: Path, ckpt: Ckpt) -> None:
    marker = tmp_path / "ran"
    write(tmp_path / "m.pt", call("os.system", f"touch {marker}"))
    answer = ckpt("scan", tmp_path / "m.pt")
    assert answer.code == 1
    assert answer.lines[0].split("\t")[:2] == ["error", "dangerous-global"]
    assert not marker.exists()


def test_all_adds_the_names_that_do_no_harm(work: Path, ckpt: Ckpt) -> None:
    lines = ckpt("scan", "-a", "mlp.pt").lines
    assert {tuple(line.split("\t")[:2]) for line in lines} == {("ok", "allowed")}
    assert any("torch._utils._rebuild_tensor_v2" in line for line in lines)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"remember the milk\n", b"cmod\n\xf8\n", b""])
def test_what_can_hold_no_pickle_is_trouble(tmp_path: Path, ckpt: Ckpt, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    answer = ckpt("scan", tmp_path / "m.pt")
    assert answer.code == 2
    assert answer.err.startswith(f"ckpt: {tmp_path / 'm.pt'}: ")


@pytest.mark.parametrize("command", ["ls", "info"])
def test_ls_and_info_warn_in_one_line(tmp_path: Path, ckpt: Ckpt, command: str) -> None:
    path = write(tmp_path / "m.pt", {"a": call("posix.system", "id")})
    answer = ckpt(command, path)
    assert answer.code == 0
    assert answer.err == (
        f"warning: {path}: its pickle would run posix.system if something else loaded it; ckpt scan {path} tells more\n"
    )
    assert ckpt(command, write(tmp_path / "n.pt", {"a": call("lab.f", 1)})).err == ""


def test_text_of_the_file_is_escaped(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "m.pkl").write_bytes(stacked("os", "\x1b[31msystem", "\x1b[0m"))
    answer = ckpt("scan", tmp_path / "m.pkl")
    assert "\x1b" not in answer.out
    assert answer.code == 1


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_pickle_beyond_the_limits_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICKLE_LINES", 10)
    assert codes(scanned(tmp_path / "m.pkl", b"\x80\x02" + b"I1\n0" * 20 + b"N.")) == {"limit"}


def test_files_within_files_are_opened_to_a_depth(tmp_path: Path) -> None:
    content = HARMFUL
    for _ in range(limits.SCAN_NESTING + 3):
        content = gzip.compress(content)
    assert codes(scanned(tmp_path / "m.gz", content)) == {"not-searched"}


def test_what_is_beyond_the_bytes_to_search_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCAN_BYTES", 1000)
    found = scanned(tmp_path / "m.pkl", pickled({"x": "y" * 100_000}))
    assert found.ok
    assert codes(found, "note") == {"not-searched"}


def test_more_strings_than_are_searched_are_told(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.pkl", pickled([b"\x80\x02"] * 20_001 + [HARMFUL]))
    assert codes(found) == {"not-searched"}


def test_a_long_string_that_is_no_text_is_searched_all_the_same(tmp_path: Path) -> None:
    raw = b"\xff" * (limits.INLINE_BYTES + 1)
    found = scanned(tmp_path / "m.pkl", b"\x80\x02X" + struct.pack("<I", len(raw)) + raw + b".")
    assert found.ok


def test_scan_imports_nothing_heavy(work: Path) -> None:
    code = "import sys; from ckpt_cli.cli.main import run; run(['scan', 'train.pt']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.replace("'", "").strip("[]\n").split(", "))
    assert not modules & {"torch", "numpy", "rich", "ml_dtypes", "safetensors"}


def test_a_gzip_that_inflates_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCAN_INFLATED", 10_000)
    assert codes(scanned(tmp_path / "m.gz", gzip.compress(b"\x80\x02" + b"N0" * 10_000 + b"N."))) >= {"not-searched"}


@pytest.mark.parametrize("size", range(1, 30))
def test_a_pickle_too_short_for_a_zip_is_no_zip(tmp_path: Path, size: int) -> None:
    scan_or_refuse(tmp_path / "m.pkl", (b"\x80\x02N." + b"PK\5\6" * 7)[:size])


@pytest.mark.parametrize("command", ["ls", "scan"])
def test_a_zip_too_short_for_its_end_record_is_trouble(tmp_path: Path, ckpt: Ckpt, command: str) -> None:
    (tmp_path / "m.pt").write_bytes(b"PK\5\6" + b"x" * 8)
    answer = ckpt(command, tmp_path / "m.pt")
    assert answer.code == 2
    assert "end record" in answer.err


def test_damage_of_every_byte_is_survived(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.pt", {"a": [call("lab.f", 1), b"x" * 20]}).read_bytes()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        scan_or_refuse(tmp_path / "d.pt", bytes(damaged))
        scan_or_refuse(tmp_path / "d.pt", whole[:at])


def scan_or_refuse(path: Path, content: bytes) -> None:
    from ckpt_cli.errors import CkptError

    path.write_bytes(content)
    try:
        scan(str(path))
    except CkptError:
        return


def test_shared_and_cyclic_values_are_told_without_end(tmp_path: Path) -> None:
    cyclic = Ops(put(0, []) + get(0) + b"a" + b"(" + b"j\0\0\0\0" * 50 + b"e")
    found = scanned(tmp_path / "m.pkl", pickled(call("os.system", cyclic)))
    assert len(found.findings[0].message) < 2000
