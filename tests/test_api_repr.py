"""What checkpoints, views and tensors print at a prompt and in a notebook."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import ckpt_cli


class Cells(HTMLParser):
    """The tags of some HTML, and the text of its cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert not attrs
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.lasttag == "td":
            self.cells[-1] += data


@pytest.fixture
def many(tmp_path: Path) -> Path:
    state = {f"w{n}": torch.ones(2, 3) for n in range(30)}
    torch.save({"<b>&": 3, "state": state, "note": "<script>alert(1)</script>"}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_a_checkpoint_prints_its_format_and_sizes_on_one_line(many: Path) -> None:
    with ckpt_cli.open(many) as checkpoint:
        assert repr(checkpoint) == f"<ckpt_cli.Checkpoint {str(many)!r}: zip, 30 tensors of 720 B, 32 names>"
    assert repr(checkpoint).endswith("32 names, closed>")


def test_a_notebook_shows_the_first_entries_as_text(many: Path) -> None:
    with ckpt_cli.open(many) as checkpoint:
        shown = Cells(checkpoint._repr_html_())
        assert shown.cells[:8] == ["<b>&", "3", "", "", "state.w0", "float32", "[2,3]", "24 B"]
        assert len(shown.cells) == 4 * 20
        assert "<p>and 12 more</p>" in checkpoint._repr_html_()
        view = Cells(checkpoint["state"]._repr_html_())
        assert view.cells[:4] == ["w0", "float32", "[2,3]", "24 B"]
        tensor = Cells(checkpoint["state.w0"]._repr_html_())
        assert tensor.cells == ["float32", "[2,3]", "[3,1]", "6", "24 B", "tensor", "False"]
    assert shown.tags | tensor.tags == {"div", "code", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert Cells(checkpoint._repr_html_()).cells == shown.cells  # also once it is closed


def test_markup_in_values_and_tensors_without_a_shape_are_shown(tmp_path: Path) -> None:
    state = {"note": "<script>", "lazy": torch.nn.LazyLinear(3).weight, "x" * 1000: 1}
    torch.save(state, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        html = checkpoint._repr_html_()
        assert "<script>" not in html
        assert "?" in Cells(html).cells
        assert "?" in Cells(checkpoint["lazy"]._repr_html_()).cells
        assert max(map(len, Cells(html).cells)) <= 300
