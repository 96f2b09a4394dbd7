"""README.md and docs/: short enough, linked rightly, complete, and in plain words."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Ckpt

import ckpt_cli
from ckpt_cli.cli.app import COMMAND_LINES

ROOT = Path(ckpt_cli.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted(DOCS.glob("*.md"))

_GENERATED = re.compile(r"<!-- \[\[\[cog.*?<!-- \[\[\[end\]\]\] -->", re.DOTALL)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def names_of(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def prose(page: Path) -> str:
    """The text of a page without generated blocks and code."""
    return _CODE.sub("", _GENERATED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What links can name in a page: its headings, spelled as GitHub spells them in links."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub(lambda code: code[0].strip("`"), page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6_000


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_every_relative_link_resolves(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_GENERATED.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_links_every_page() -> None:
    links = set(_LINK.findall((DOCS / "index.md").read_text()))
    assert {page.name for page in DOCS.glob("*.md")} - links == {"index.md"}


def test_every_command_has_a_section() -> None:
    assert re.findall(r"^### ckpt ([\w ]+)$", (DOCS / "cli.md").read_text(), re.MULTILINE) == list(COMMAND_LINES)


def test_every_format_that_can_be_written_is_documented(work: Path, ckpt: Ckpt) -> None:
    hint = re.search(r"hint: one of (.+)", ckpt("convert", "mlp.pt", "out", "--to", "nothing").err)
    assert hint
    text = (DOCS / "convert.md").read_text()
    assert [name for name in hint[1].split(", ") if f"| `{name}` |" not in text] == []


def test_generated_blocks_stand_only_where_they_are_checked() -> None:
    makefile = (ROOT / "Makefile").read_text()
    checked = re.search(r"^DOCUMENTS := (.+)$", makefile, re.MULTILINE)
    assert checked
    assert "docs/*.md" in checked[1]
    others = [page for page in ROOT.glob("*.md") if page.name not in checked[1].split()]
    assert [page.name for page in others if "[[[cog" in page.read_text()] == []


def test_every_page_has_its_generated_blocks_filled() -> None:
    empty = [page.name for page in PAGES if re.search(r"\]\]\] -->\n<!-- \[\[\[end", shown_blocks(page))]
    assert empty == []


def shown_blocks(page: Path) -> str:
    """The generated blocks of a page that print something."""
    found: list[str] = _GENERATED.findall(page.read_text())
    return "\n".join(block for block in found if "prepare(" not in block and "quietly(" not in block)


def test_every_file_that_the_architecture_names_exists() -> None:
    text = _GENERATED.sub("", (DOCS / "architecture.md").read_text())
    named = set(re.findall(r"(?<![\w/.])(?:[a-z_]+/)*[a-z_0-9]+\.py\b|(?<=`)(?:[a-z_]+/)+(?=`)", text))
    assert len(named) > 50
    package = ROOT / "ckpt_cli"
    names = {path.name + "/" * path.is_dir() for path in package.rglob("*")}  # of files and folders, without a path
    assert [path for path in named - names if not (package / path).exists() and not (ROOT / path).exists()] == []


WORDS = ("anew", "told", "is none", "so many bytes", "being the same")
"""What STYLE calls words to be decoded."""


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_pages_are_written_in_plain_words(page: Path) -> None:
    text = prose(page)
    assert [word for word in WORDS if re.search(rf"\b{word}\b", text)] == []


JSON_ANSWERS = (
    "ls -a train.pt", "ls --waste slices.pt", "ls --fold tied.pt", "info tied.pt", "tree train.pt", "show train.pt",
    "ties tied.pt --equal", "ties tied.pt 2.weight 4.weight", "stats mlp.pt --total", "diff mlp.pt tied.pt",
    "match train.pt tied.pt --of optimizer",
    "match train.pt mlp.pt --of ''",
    "check --deep mlp.pt", "hash mlp.pt", "hash mlp.pt --verify mlp.json", "scan train.pt",
    "set mlp.pt 2.bias=0 --backup", "undo mlp.pt", "rename mlp.pt 2 last", "rm mlp.pt 0.bias",
    "keep mlp.pt 0", "cast mlp.pt float16 --lossy", "tie tied.pt 2.weight 6.weight --force", "untie tied.pt 4.bias",
    "meta tied.safetensors a=b", "compact slices.pt", "convert tied.pt new.safetensors", "cast shards float16 -o cast",
)  # fmt: skip
"""Commands whose every key with `--json` is documented."""

OF_DATA = ("tensors", "renamed", "placed", "aliases", "metadata", "dtypes", "shards", "value", "values")
"""Keys below which the keys are names from the file."""


def keys_of(answer: object) -> Iterator[str]:
    """Every key of a JSON value, except names from the file."""
    for item in answer if isinstance(answer, list) else []:
        yield from keys_of(item)
    for key, value in answer.items() if isinstance(answer, dict) else []:
        yield key
        if key not in OF_DATA or isinstance(value, list):
            yield from keys_of(value)


@pytest.mark.parametrize("command", JSON_ANSWERS)
def test_every_key_of_an_answer_is_documented(work: Path, ckpt: Ckpt, command: str) -> None:
    import torch

    torch.save({"rows": torch.zeros(1000, 4)[:2]}, "slices.pt")
    Path("mlp.json").write_text(ckpt("hash", "mlp.pt", "--json").out)
    assert ckpt("convert", "tied.pt", "shards", "--max-shard", "300B").code == 0
    Path("shards", "config.json").write_text("{}")
    if command.startswith("undo"):
        assert ckpt("set", "mlp.pt", "2.bias=0", "--backup").code == 0
    answer = ckpt(*shlex.split(command), "--json")
    assert answer.code in (0, 1), answer.err
    found = json.loads(answer.out)
    text = (DOCS / "json.md").read_text()
    assert [key for key in dict.fromkeys(keys_of(found)) if not re.search(rf'["`]{re.escape(key)}["`]', text)] == []
