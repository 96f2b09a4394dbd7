"""Ratios of whole processes, side by side in one run: ours, a command that does nothing, and the usual scripts.

    make bench                      all of it, some ten minutes
    python bench.py [WORD…]         the commands whose labels have one of the words, and what those are compared with

Every round runs each command once, so that a slow moment of the machine hits all of them; the median counts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tabulate import tabulate

HERE = Path(__file__).parent
PYTHON = sys.executable
CKPT = str(Path(PYTHON).with_name("ckpt"))
ROUNDS = 9
SLOW_ROUNDS = 3
"""Rounds of commands that import torch, and of those that read gigabytes."""
FRAMEWORKS = HERE.parents[1] / ".venv-frameworks"
"""Where `make environments` has DeepSpeed, which is compared with only if it is there."""
ORACLES = HERE.parents[1] / ".venv-oracles"
"""Where `make oracles` has PEFT, the same."""
READ = "readv loop, {}"
"""A plain loop of readv into one megabyte: what reading costs."""


@dataclass
class Row:
    """One command and what it took."""

    label: str
    command: list[str]
    against: str = ""
    """The label of the row that its ratio is taken against."""
    target: str = ""
    """What the ratio has to stay under."""
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    """Kilobytes of memory at most."""

    @property
    def answers(self) -> tuple[int, ...]:
        """Exit codes that are no failure: of a comparison, that there are differences too."""
        return (0, 1) if "diff" in self.command else (0,)

    @property
    def is_slow(self) -> bool:
        """Whether it imports torch or reads gigabytes."""
        return any(
            word in " ".join(self.command)
            for word in ("torch", "GB.values", "1GB.bfloat16", "1GB.float16", "zero", "lora", "fp8")
        )

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def run(self) -> None:
        """Run it once."""
        begin = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - begin)
        self.peak = max(self.peak, usage.ru_maxrss)
        if os.waitstatus_to_exitcode(status) not in self.answers:
            raise SystemExit(f"{self.label} failed: {' '.join(self.command)}")


def python(code: str) -> list[str]:
    """A script as people write it."""
    return [PYTHON, "-c", code]


def rows(folder: Path) -> list[Row]:
    """Every command, in the order of the report."""
    name = "layers.7.part1.weight"
    found = [Row("no-op Typer command", [PYTHON, str(HERE / "noop.py")])]
    for size in ("1GB", "20GB"):
        for suffix in ("pt", "safetensors"):
            path = str(folder / f"{size}.{suffix}")
            found.append(Row(f"ckpt ls {size}.{suffix}", [CKPT, "ls", path], "no-op Typer command", "1.5"))
    big, small = str(folder / "20GB.pt"), str(folder / "small.pt")
    tensors, one = str(folder / "20GB.safetensors"), str(folder / "1GB.pt")
    usual = "import torch\ns = torch.load({!r}{})\n{}"
    listed = "for n, t in s.items(): print(n, t.dtype, t.shape)"
    edited = f"s[{name!r}][0, 0] += 1\ntorch.save(s, {str(folder / 'out.pt')!r})"
    out = str(folder / "converted.safetensors")
    shards = str(folder / "set")
    rewritten = f"from safetensors.torch import save_file\nsave_file({{}}, {out!r})"
    as_they_are, cast = "s", "{k: v.to(torch.bfloat16) for k, v in s.items()}"
    real = str(folder / "real.pt")
    return [
        *found,
        Row("ckpt ls 20GB.pt as a table", [CKPT, "ls", "-f", "table", big], "no-op Typer command", "2.2"),
        Row("ckpt ls 20GB.pt, legacy", [CKPT, "ls", str(folder / "20GB.legacy.pt")], "no-op Typer command", "1.5"),
        Row("ckpt ls, one shard of 5 GB", [CKPT, "ls", str(folder / "set" / f"model-{1:05}-of-{200:05}.safetensors")]),
        Row("ckpt ls, 200 shards of 5 GB", [CKPT, "ls", shards], "ckpt ls, one shard of 5 GB", "3"),
        Row("ckpt ls, 10,000 tensors", [CKPT, "ls", str(folder / "10k.pt")], "no-op Typer command", "+0.25 s"),
        *many_rows(folder),
        Row("import torch", python("import torch"), "ckpt ls 20GB.pt"),
        Row(
            "torch.load(mmap=True), list, 20GB.pt", python(usual.format(big, ", mmap=True", listed)), "ckpt ls 20GB.pt"
        ),
        Row("torch.load, list, 1GB.pt", python(usual.format(one, "", listed)), "ckpt ls 1GB.pt"),
        Row(
            "safe_open, list, 20GB.safetensors",
            python(
                f"from safetensors import safe_open\nwith safe_open({tensors!r}, 'numpy') as f:\n"
                "  for n in f.keys(): print(n, f.get_slice(n).get_dtype(), f.get_slice(n).get_shape())"
            ),
            "ckpt ls 20GB.safetensors",
        ),
        Row("import numpy", python("import numpy")),
        Row("ckpt show small.pt 0.bias", [CKPT, "show", small, "0.bias"], "import numpy + no-op", "1.5"),
        Row("ckpt show 20GB.pt NAME[0,0]", [CKPT, "show", big, f"{name}[0,0]"], "import numpy + no-op"),
        Row(
            "ckpt set 20GB.pt NAME[0,0]+=1", [CKPT, "set", big, f"{name}[0,0]+=1"], "ckpt show 20GB.pt NAME[0,0]", "1.3"
        ),
        Row(
            "ckpt set 20GB.safetensors NAME[0,0]+=1",
            [CKPT, "set", tensors, f"{name}[0,0]+=1"],
            "ckpt show 20GB.pt NAME[0,0]",
            "1.3",
        ),
        Row("ckpt set 1GB.pt NAME[0,0]+=1", [CKPT, "set", one, f"{name}[0,0]+=1"]),
        Row(
            "torch.load, edit, torch.save, 1GB.pt",
            python(usual.format(one, "", edited)),
            "ckpt set 1GB.pt NAME[0,0]+=1",
        ),
        Row(
            "torch.load(mmap=True), edit, torch.save, 1GB.pt",
            python(usual.format(one, ", mmap=True", edited)),
            "ckpt set 1GB.pt NAME[0,0]+=1",
        ),
        Row("cp real.pt", ["cp", real, str(folder / "copied.pt")]),
        Row("ckpt rename real.pt, longer names", [CKPT, "rename", real, "--sub", "$", "x"], "cp real.pt", "1"),
        Row(
            "ckpt rename 20GB.safetensors, header alone",
            [CKPT, "rename", str(folder / "20GB.names.safetensors"), "--sub", "^(.)(.{5})", r"\2\1"],
            "ckpt ls 20GB.safetensors",
            "1.3",
        ),
        Row(
            "ckpt rename of 200 shards, headers alone",
            [CKPT, "rename", shards, "--sub", "^(.)(.{5})", r"\2\1"],
            "ckpt ls, 200 shards of 5 GB",
        ),
        Row("ckpt convert real.pt to safetensors", [CKPT, "convert", real, out, "--force"], "cp real.pt", "1.25"),
        Row(
            "torch.load, save_file, real.pt",
            python(usual.format(real, "", rewritten.format(as_they_are))),
            "ckpt convert real.pt to safetensors",
        ),
        Row(
            "ckpt convert real.pt to bfloat16",
            [CKPT, "convert", real, out, "--force", "--dtype", "bf16"],
            "cp real.pt",
        ),
        Row(
            "torch.load, bfloat16, save_file, real.pt",
            python(usual.format(real, "", rewritten.format(cast))),
            "ckpt convert real.pt to bfloat16",
        ),
        Row("ckpt cast real.pt bfloat16", [CKPT, "cast", real, "bf16", "-o", str(folder / "cast.pt")]),
        Row(
            "torch.load, bfloat16, torch.save, real.pt",
            python(usual.format(real, "", f"torch.save({cast}, {str(folder / 'cast.pt')!r})")),
            "ckpt cast real.pt bfloat16",
        ),
    ]


def many_rows(folder: Path) -> list[Row]:
    """Commands on files of many tensors: at most 8 and 12 microseconds for each, and 3 seconds for an edit."""
    nothing = "no-op Typer command"
    found = []
    for name, target in (("100k.safetensors", "+0.8 s"), ("66k.pt", "+0.79 s")):
        path = str(folder / name)
        found.append(Row(f"ckpt ls {name}", [CKPT, "ls", path], nothing, target))
        longer = [CKPT, "rename", path, "--sub", "$", "x"]
        found.append(Row(f"ckpt rename {name}, longer names", longer, nothing, "+3 s"))
    return found


def ranks_rows(folder: Path) -> list[Row]:
    """Files of four ranks put together, as DeepSpeed's own script does it."""
    zero, joined = str(folder / "zero"), str(folder / "joined")
    sources = sorted(FRAMEWORKS.glob("deepspeed-*/deepspeed"))
    usual = "zero_to_fp32, 4 ranks of 600 MB"
    mine = [
        Row("ckpt ls, 4 ranks of 600 MB", [CKPT, "ls", zero], "no-op Typer command", "1.5"),
        Row("ckpt convert, 4 ranks of 600 MB", [CKPT, "convert", zero, f"{joined}.pt", "--force"]),
    ]
    if not sources:
        return mine
    script = ["env", f"PYTHONPATH={sources[-1].parent}", "DS_ACCELERATOR=cpu", str(FRAMEWORKS / "bin" / "python"), "-m"]
    theirs = Row(usual, [*script, "deepspeed.utils.zero_to_fp32", zero, joined])
    return [mine[0], theirs, replace(mine[1], against=usual, target="0.2")]


def lora_rows(folder: Path) -> list[Row]:
    """An adapter merged into a model of 1 GB, as PEFT does it."""
    base, adapter, output = (str(folder / name) for name in ("lora-base", "lora-adapter", "lora-merged"))
    usual = "PEFT merge_and_unload, 1GB"
    mine = Row("ckpt lora merge, 1GB", [CKPT, "lora", "merge", base, adapter, "-o", f"{output}.safetensors", "--force"])
    peft = ORACLES / "bin" / "python"
    if not peft.exists():
        return [mine]
    code = (
        "import sys; from transformers import AutoModelForCausalLM as Model; from peft import PeftModel; "
        "model = Model.from_pretrained(sys.argv[1], dtype='auto'); "
        "PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])"
    )
    theirs = Row(usual, ["env", "HF_HUB_OFFLINE=1", str(peft), "-W", "ignore", "-c", code, base, adapter, output])
    return [theirs, replace(mine, against=usual, target="0.33")]


def dequantize_rows(folder: Path) -> list[Row]:
    """Weights of 512 MB in fp8 with block scales, as DeepSeek's formula has it in torch, tensor by tensor."""
    source, output = str(folder / "fp8-blocks"), str(folder / "fp8-plain")
    code = (
        "import sys, torch; from safetensors import safe_open; from safetensors.torch import save_file\n"
        "found = {}\n"
        "with safe_open(sys.argv[1] + '/model.safetensors', 'pt') as file:\n"
        "  for name in file.keys():\n"
        "    if name.endswith('_scale_inv'): continue\n"
        "    weight, scale = file.get_tensor(name).float(), file.get_tensor(name + '_scale_inv')\n"
        "    rows, columns = weight.shape\n"
        "    blocks = weight.view(rows // 128, 128, columns // 128, 128) * scale[:, None, :, None]\n"
        "    found[name] = blocks.view(rows, columns).bfloat16()\n"
        "save_file(found, sys.argv[2])"
    )
    usual = "fp8 script in torch, 512MB"
    mine = [CKPT, "dequantize", source, "-o", f"{output}.safetensors", "--force"]
    return [
        Row(usual, [PYTHON, "-c", code, source, f"{output}.torch"]),
        Row("ckpt dequantize, 512MB of fp8", mine, usual, "0.33"),
    ]


def average_rows(folder: Path) -> list[Row]:
    """The average of two models of 1 GB, as a script in torch and mergekit make it."""
    first, other, output = (str(folder / name) for name in ("lora-base", "lora-other", "average"))
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file\n"
        "one, other = (load_file(path + '/model.safetensors') for path in sys.argv[1:3])\n"
        "made = {name: ((one[name].float() + other[name].float()) / 2).to(one[name].dtype) for name in one}\n"
        "save_file(made, sys.argv[3])"
    )
    usual = "average script in torch, 2 × 1GB"
    mine = Row(
        "ckpt avg, 2 × 1GB", [CKPT, "avg", first, other, "-o", f"{output}.safetensors", "--force"], usual, "0.75"
    )
    rows = [Row(usual, [PYTHON, "-c", code, first, other, f"{output}.torch"]), mine]
    mergekit = ORACLES / "bin" / "mergekit-yaml"
    if mergekit.exists():
        theirs = Row("mergekit linear, 2 × 1GB", [
            "env", "HF_HUB_OFFLINE=1", str(mergekit), str(folder / "linear.yaml"), f"{output}-mergekit",
            "--no-copy-tokenizer", "--no-write-model-card",
        ])  # fmt: skip
        rows += [theirs, replace(mine, label="ckpt avg against mergekit", against=theirs.label, target="0.25")]
    return rows


def values_rows(folder: Path) -> list[Row]:
    """Commands that read every byte, against what reads it and does less or more."""
    loop = "import os, sys\nb = [bytearray(1 << 20)]\nf = os.open(sys.argv[1], os.O_RDONLY)\nwhile os.readv(f, b): pass"
    usual = (
        "import sys, torch\nfor name, t in torch.load(sys.argv[1]).items():\n"
        "  print(name, t.min(), t.max(), t.mean(), t.std(), t.isnan().sum())"
    )
    four, one, same, other = (
        str(folder / f"{name}.pt") for name in ("4GB.values", "1GB.values", "1GB.same", "1GB.other")
    )
    small = str(folder / "200.pt")
    run = [str(folder / "run.1GB.values" / f"{step}.safetensors") for step in range(50)]
    each = "for file in {}; do {} stats $file; done"
    halves = []
    for kind in ("bfloat16", "float16"):
        path = str(folder / f"1GB.{kind}.pt")
        halves.append(Row(READ.format(f"1GB {kind}"), [*python(loop), path]))
        halves.append(Row(f"ckpt stats, 1GB {kind}", [CKPT, "stats", path], READ.format(f"1GB {kind}"), "5"))
    return [
        Row(READ.format("4GB"), [*python(loop), four]),
        Row("ckpt stats, 4GB float32", [CKPT, "stats", four], READ.format("4GB"), "2"),
        Row("torch.load, min, max, mean, std, isnan, 4GB", [*python(usual), four], "ckpt stats, 4GB float32"),
        *halves,
        Row(READ.format("1GB"), [*python(loop), one]),
        Row("sha256sum, 1GB", ["sha256sum", one]),
        Row("ckpt hash, 1GB", [CKPT, "hash", one], "sha256sum, 1GB", "0.5"),
        Row("cmp, 1GB", ["cmp", one, same]),
        Row("ckpt diff, 1GB, equal", [CKPT, "diff", one, same], "cmp, 1GB", "1.43"),
        Row("ckpt diff, 1GB float32, all different", [CKPT, "diff", one, other], READ.format("1GB"), "4"),
        Row("ckpt check --deep, 1GB", [CKPT, "check", "--deep", one], READ.format("1GB"), "4"),
        Row("ckpt stats of each, 2 x 1GB", ["sh", "-c", each.format(f"{one} {other}", CKPT)]),
        Row("ckpt series, 2 x 1GB", [CKPT, "series", one, other], "ckpt stats of each, 2 x 1GB", "1.2"),
        Row("ckpt stats of each, 50 x 1GB", ["sh", "-c", each.format(" ".join(run), CKPT)]),
        Row("ckpt series, 50 x 1GB", [CKPT, "series", *run], "ckpt stats of each, 50 x 1GB", "1.2"),
        Row("ckpt stats, 200 small tensors", [CKPT, "stats", small]),
        Row("ckpt hash, 200 small tensors", [CKPT, "hash", small]),
        Row("ckpt diff, 200 small tensors", [CKPT, "diff", small, small]),
        Row("ckpt check --deep, 200 small tensors", [CKPT, "check", "--deep", small]),
    ]


def report(measured: list[Row]) -> str:
    """The table: seconds, memory, the ratio and what it should stay under."""
    medians = {row.label: row.median for row in measured}
    if "import numpy" in medians:
        medians["import numpy + no-op"] = medians["import numpy"] + medians["no-op Typer command"]
    lines = []
    for row in measured:
        ratio = f"{row.median / medians[row.against]:.2f}" if row.against else ""
        if row.target.startswith("+"):
            ratio = f"+{row.median - medians[row.against]:.3f} s"
        lines.append(
            [row.label, f"{row.median * 1000:.0f} ms", f"{row.peak / 1024:.0f} MB", ratio, row.against, row.target]
        )
    headings = ["command", "median", "peak memory", "ratio", "against", "target"]
    return tabulate(
        lines, headings, disable_numparse=True, colalign=("left", "right", "right", "right", "left", "right")
    )


def chosen(every: list[Row], words: list[str]) -> list[Row]:
    """The rows whose labels have one of the words, and those that they are compared with; all where there is none."""
    named = {row.label for row in every if not words or any(word in row.label for word in words)}
    named |= {part for row in every if row.label in named for part in row.against.split(" + ")}
    named |= {"no-op Typer command"} if "no-op" in named else set()
    return [row for row in every if row.label in named]


def main(words: list[str]) -> None:
    """Write the files, run every round, print the table."""
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as name:
        folder = Path(name)
        combined = [*dequantize_rows(folder), *average_rows(folder)]
        compared = [*ranks_rows(folder), *lora_rows(folder), *combined, *values_rows(folder)]
        measured = chosen([*rows(folder), *compared], words)
        subprocess.run([PYTHON, str(HERE / "files.py"), name], check=True)
        for row in measured:
            row.run()  # once unmeasured: the page cache, and compiled modules
            row.seconds.clear()
        for number in range(ROUNDS):
            for row in measured:
                if not row.is_slow or number < SLOW_ROUNDS:
                    row.run()
        print(report(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
