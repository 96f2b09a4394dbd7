"""Run picklescan, fickling, modelscan, modelaudit and `ckpt scan` on the same files, and print what each flags.

python tests/peers/scanners.py [CACHE]

Each of the others is installed by pip into an environment of its own below CACHE, by default in the temporary folder.
The hostile files are those of the tests of the scanner; the clean ones are the samples and what torch writes. No file
is loaded: the scanners read them. The exit code is 1 if another one flags a hostile file that ckpt does not, or if
ckpt flags a clean one.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "support"), str(TESTS / "scanner")]

import test_lists  # noqa: E402
import test_trace  # noqa: E402
import test_transforms  # noqa: E402
import test_walk  # noqa: E402
from builders.pickles import pickled  # noqa: E402
from scanning import HARMFUL, stacked  # noqa: E402

from ckpt_cli.errors import CkptError  # noqa: E402
from ckpt_cli.ops.scan import scan  # noqa: E402

PACKAGES = {
    "picklescan": ["picklescan"],
    "fickling": ["fickling", "typing_extensions"],
    "modelscan": ["modelscan"],
    "modelaudit": ["modelaudit"],
}

CLEAN = (".pt", ".pt2", ".safetensors", ".npz", ".npy", ".tar")
"""Suffixes of the samples that are among the clean files."""

_DRIVER = """
import contextlib, io, json, logging, sys
logging.disable(logging.CRITICAL)
{function}
answers = {{}}
for path in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            answers[path] = "flagged" if flags(path) else "clear"
        except BaseException as error:
            answers[path] = "error"
print("ANSWERS" + json.dumps(answers))
"""

_FLAGS = {
    "picklescan": """
from picklescan.scanner import scan_file_path
def flags(path):
    found = scan_file_path(path)
    return found.issues_count > 0 or found.infected_files > 0
""",
    "fickling": """
import zipfile
from fickling.analysis import Severity
from fickling.loader import scan_file, scan_zip_archive
def flags(path):
    if zipfile.is_zipfile(path):
        found = list(scan_zip_archive(path, graceful=True).values())
    else:
        found = [scan_file(path)]
    return any(each.severity > Severity.LIKELY_SAFE for each in found)
""",
    "modelscan": """
from modelscan.modelscan import ModelScan
def flags(path):
    found = ModelScan().scan(path)
    return found["summary"]["total_issues"] > 0
""",
    "modelaudit": """
from modelaudit.core import scan_model_directory_or_file
def flags(path):
    found = scan_model_directory_or_file(path)
    return any(str(getattr(each.severity, "value", each.severity)) in ("critical", "warning") for each in found.issues)
""",
}


def write_corpus(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the hostile and the clean files; returns their paths."""
    hostile = [(f"{name}.pkl", data) for name, data in test_trace.EVASIONS.items()]
    hostile += [(f"{name}.pt", make()) for name, (make, _) in test_walk.CONTAINERS.items()]
    hostile += [(f"{name}.pkl", stacked(*name.split(), "id")) for name in test_lists.NAMES]
    hostile += [(f"{name}.pkl", pickled({"x": hide(HARMFUL)})) for name, hide in test_transforms.DISGUISES.items()]
    bad = folder / "hostile"
    bad.mkdir()
    for number, (name, data) in enumerate(hostile):
        (bad / f"{number:03} {name.replace('/', '_')}").write_bytes(data)
    good = folder / "clean"
    good.mkdir()
    for source in (*(TESTS.parent / "sample_checkpoints").iterdir(), *sorted((TESTS / "samples").rglob("*"))):
        if source.suffix in CLEAN and source.name != "two.pt":  # two pickles, one behind the other: it hides one
            below = source.parent.name if TESTS / "samples" in source.parent.parents else ""
            shutil.copy(source, good / f"{below} {source.name}".strip())
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 2))
    adam = torch.optim.AdamW(net.parameters())
    torch.save({"model": net.state_dict(), "optimizer": adam.state_dict(), "epoch": 3}, good / "training.pt")
    torch.save(net, good / "network.pt")
    torch.save(net.state_dict(), good / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"array": np.ones(3), "scalar": np.float64(1), "default": collections.defaultdict(list)}, good / "np.pt")
    return sorted(bad.iterdir()), sorted(good.iterdir())


def ours(paths: list[Path]) -> dict[str, str]:
    """What `ckpt scan` says of each file."""
    return {str(path): _ours(path) for path in paths}


def _ours(path: Path) -> str:
    try:
        return "clear" if scan(str(path)).ok else "flagged"
    except (CkptError, OSError):
        return "error"


def theirs(name: str, cache: Path, paths: list[Path]) -> tuple[str, dict[str, str]]:
    """The version of another scanner and what it says of each file; no answers where it cannot be installed."""
    environment = cache / name
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES[name]]
        if subprocess.run(pip, check=False).returncode:
            shutil.rmtree(environment)
            return "not installed", {}
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    done = subprocess.run(
        [python, "-c", _DRIVER.format(function=_FLAGS[name])],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_ANALYTICS": "1", "PROMPTFOO_DISABLE_TELEMETRY": "1", "PYTHONPATH": ""},
    )
    last = done.stdout.rpartition("ANSWERS")[2]
    return version, json.loads(last) if last.startswith("{") else {}


def main() -> int:
    """Print the table, then every hostile file that another scanner flags and ckpt does not."""
    warnings.simplefilter("ignore")
    cache = Path(sys.argv[1] if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "ckpt-peers")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bad, good = write_corpus(Path(folder))
        mine = ours(bad + good)
        rows = [("`ckpt scan`", "", mine)]
        for name in PACKAGES:
            version, answers = theirs(name, cache, bad + good)
            rows.append((name, version, answers))
        hostile, clean = f"hostile files flagged, of {len(bad)}", f"clean files flagged, of {len(good)}"
        print(f"| scanner | version | {hostile} | errors | {clean} |")
        print("|---|---|---|---|---|")
        for name, version, answers in rows:
            if not answers:
                print(f"| {name} | {version} | not run | | |")
                continue
            flagged = [sum(answers.get(str(path)) == "flagged" for path in paths) for paths in (bad, good)]
            errors = sum(answers.get(str(path), "error") == "error" for path in bad + good)
            print(f"| {name} | {version} | {flagged[0]} | {errors} | {flagged[1]} |")
        missed = 0
        for path in bad:
            by = [name for name, _, answers in rows[1:] if answers.get(str(path)) == "flagged"]
            if mine[str(path)] != "flagged":
                missed += bool(by)
                print(f"not flagged by ckpt: {path.name}; flagged by {', '.join(by) or 'none'}", file=sys.stderr)
        alarms = [path.name for path in good if mine[str(path)] == "flagged"]
        print(f"false alarms of ckpt: {alarms}", file=sys.stderr)
    return int(bool(missed or alarms))


if __name__ == "__main__":
    sys.exit(main())
