"""What `ckpt set` refuses, and its options: backups, dry runs, outputs, links."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from set_editor import Editor, problem_of


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_tensors_without_plain_values_are_refused_by_what_they_are(editor: Editor) -> None:
    state = {
        "coo": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": torch.empty(2, device="meta"),
        "lazy": torch.nn.UninitializedParameter(),
    }
    layouts = ["sparse_coo", "sparse_csr", "nested", "meta", "uninitialized"]
    for name, layout in zip(state, layouts, strict=True):
        assert editor.refused(state, f"{name}=0").startswith(f"tensor '{name}' is {layout}")


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", [3, 2], 3), ("F4", [2, 1], 1), ("F6_E2M3", [4], 3)])
def test_packed_elements_of_safetensors_are_set_in_pairs_or_refused(
    editor: Editor, dtype: str, shape: list[int], nbytes: int
) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    Path("a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    answer = editor.ckpt("set", "a.safetensors", "x=0.5")
    if shape[-1] % 2 == 0 and dtype == "F4":
        assert answer.code == 0
        assert Path("a.safetensors").read_bytes()[-nbytes:] == b"\x11" * nbytes
    else:
        assert "whose packing its format does not define" in problem_of(answer, "a.safetensors")


def test_a_compressed_storage_is_refused_with_a_hint(editor: Editor) -> None:
    torch.save({"x": torch.ones(100)}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as old, zipfile.ZipFile("a.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    before = Path("a.pt").read_bytes()
    for args in ([], ["-o", "b.pt"]):
        problem = problem_of(editor.ckpt("set", "a.pt", "x[0]=2", *args), "a.pt")
        assert "is compressed" in problem
        assert "\nhint: " in problem
    assert Path("a.pt").read_bytes() == before
    assert not Path("b.pt").exists()


def test_a_file_in_the_hugging_face_cache_is_refused_but_may_be_a_source(editor: Editor) -> None:
    blob = Path("hub/models--a--b/blobs") / ("0123456789abcdef" * 4)
    link = Path("hub/models--a--b/snapshots/main/model.pt")
    blob.parent.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    torch.save({"x": torch.ones(2)}, blob)
    link.symlink_to(os.path.relpath(blob, link.parent))
    before = blob.read_bytes()
    for path in (str(link), str(blob)):
        problem = problem_of(editor.ckpt("set", path, "x=0"), path)
        assert problem.endswith("\nhint: write the result elsewhere with -o OUT")
        assert problem_of(editor.ckpt("set", path, "x=0", "-n"), path) == problem
    assert editor.ckpt("set", link, "x=0", "-o", "out.pt").code == 0
    assert torch.load("out.pt")["x"].tolist() == [0, 0]
    assert "the Hugging Face hub's cache" in editor.ckpt("set", "out.pt", "x=0", "-o", link).err
    assert blob.read_bytes() == before


def test_a_file_that_another_process_writes_is_refused(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.files.lock.PATIENCE", 0.2)
    torch.save({"x": torch.ones(2)}, "a.pt")
    with open("a.pt", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert problem_of(editor.ckpt("set", "a.pt", "x=0"), "a.pt") == (
            "another process is writing it; try again when it is done"
        )
        assert editor.ckpt("show", "a.pt", "x").out == "tensor([1., 1.])\n"
        assert editor.ckpt("set", "a.pt", "x=0", "-n").code == 0
    assert editor.ckpt("set", "a.pt", "x=0").code == 0


# --- options ---------------------------------------------------------------------------------------------------------


def test_a_backup_is_the_old_file_and_never_replaces_an_older_one(editor: Editor) -> None:
    torch.save({"x": torch.ones(2)}, "a.pt")
    Path("a.pt.bak").write_text("older")
    before = Path("a.pt").read_bytes()
    assert editor.ckpt("set", "a.pt", "x=0", "--backup").err.endswith(", the old file is a.pt.bak.2\n")
    assert (Path("a.pt.bak").read_text(), Path("a.pt.bak.2").read_bytes()) == ("older", before)
    assert editor.ckpt("set", "a.pt", "x=0", "--backup").err.endswith("  it was so already\n")
    assert not Path("a.pt.bak.3").exists()


def test_a_dry_run_writes_nothing_anywhere(editor: Editor) -> None:
    torch.save({"x": torch.ones(2)}, "a.pt")
    before = Path("a.pt").read_bytes()
    for args in ([], ["-o", "b.pt"], ["--backup"], ["--json"]):
        assert editor.ckpt("set", "a.pt", "x=0", "--dry-run", *args).code == 0
    assert editor.ckpt("set", "a.pt", "x=abc", "--dry-run").code == 2
    assert Path("a.pt").read_bytes() == before
    assert os.listdir() == ["a.pt"]


@pytest.mark.parametrize("output", ["a.pt", "./a.pt", "link.pt", "hard.pt", "../{}/a.pt"])
def test_an_output_that_is_the_file_itself_is_refused(editor: Editor, output: str, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, "a.pt")
    Path("link.pt").symlink_to("a.pt")
    os.link("a.pt", "hard.pt")
    output = output.format(tmp_path.name)
    answer = editor.ckpt("set", "a.pt", "x=0", "-o", output)
    assert problem_of(answer, output) == "the output is the file itself\nhint: leave -o out to edit it in place"
    assert torch.load("a.pt")["x"].tolist() == [1, 1]


def test_an_output_replaces_a_file_with_its_permissions_and_a_new_one_gets_those_of_the_source(editor: Editor) -> None:
    torch.save({"x": torch.ones(2)}, "a.pt")
    os.chmod("a.pt", 0o640)
    Path("old.pt").write_text("old")
    os.chmod("old.pt", 0o604)
    for output, mode in (("old.pt", 0o604), ("new.pt", 0o640)):
        assert editor.ckpt("set", "a.pt", "x=0", "-o", output).code == 0
        assert stat.S_IMODE(os.stat(output).st_mode) == mode
        assert torch.load(output)["x"].tolist() == [0, 0]
    assert sorted(os.listdir()) == ["a.pt", "new.pt", "old.pt"]


def test_an_edit_through_a_link_reaches_the_file_and_leaves_the_link(editor: Editor) -> None:
    Path("real").mkdir()
    torch.save({"x": torch.ones(2)}, "real/a.pt")
    os.chmod("real/a.pt", 0o600)
    Path("link.pt").symlink_to("real/a.pt")
    inode = os.stat("real/a.pt").st_ino
    assert editor.ckpt("set", "link.pt", "x=0").code == 0
    assert Path("link.pt").is_symlink()
    assert (os.stat("real/a.pt").st_ino, stat.S_IMODE(os.stat("real/a.pt").st_mode)) == (inode, 0o600)
    assert torch.load("real/a.pt")["x"].tolist() == [0, 0]
