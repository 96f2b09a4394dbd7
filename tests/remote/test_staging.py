"""New checkpoints in object stores: staged here, read back, uploaded, removed; the index last, and all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import contract
import pytest
import torch
from buckets import Asked, Buckets, at_request, interrupt
from conftest import Ckpt
from safetensors.torch import load_file

from ckpt_cli.files import new_folder
from ckpt_cli.remote import cloud_requests

FORMATS = {form.label: form for form in contract.FORMATS if form.label not in ("pt2-old", "dcp-ranks")}
"""All but two that take long to write, and are read like others."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pauses between tries."""
    monkeypatch.setattr(cloud_requests, "_PAUSES", (0.0,) * len(cloud_requests._PAUSES))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: Buckets) -> Path:
    """A folder with a file and a set, which are also in the bucket."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for folder in (work, buckets.bucket()):
        FORMATS["zip"].put(folder / "m.pt")
        FORMATS["shards-safetensors"].put(folder / "set")
        (folder / "set" / "config.json").write_text('{"dtype": "float32"}')
    return work


def written(buckets: Buckets) -> list[str]:
    """The names of new objects."""
    return [name for name in buckets.names() if name.startswith("out")]


def puts(buckets: Buckets) -> list[str]:
    """The names of the objects that were written or removed, in their order."""
    changes = [asked for asked in buckets.asked if asked.method in ("PUT", "DELETE")]
    return [f"{asked.method} {asked.path.rpartition('/')[2].partition('?')[0]}" for asked in changes]


def fail_at(buckets: Buckets, name: str) -> None:
    """Refuse to write the objects of a name."""
    buckets.begin(fault="403", match=lambda asked: asked.method in ("PUT", "POST") and name in asked.path)


INDEX = "model.safetensors.index.json"


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("label", list(FORMATS))
def test_every_format_is_read_from_a_store_and_converted_to_it(buckets: Buckets, label: str, ckpt: Ckpt) -> None:
    form = FORMATS[label]
    name = f"source{form.suffix}"
    form.put(buckets.bucket() / name)
    url = f"s3://bucket/{name}"
    assert ckpt("ls", url).out == ckpt("ls", str(buckets.bucket() / name)).out
    made = ckpt("convert", url, "s3://bucket/out.safetensors", "--tensors-only")
    assert made.code == 0, made.err
    found = load_file(buckets.bucket() / "out.safetensors")
    for tensor, value in form.sample().items():
        if form.named(tensor) in found:
            assert contract.bits(found[form.named(tensor)]) == contract.bits(value)
    assert len(found) >= len(form.sample()) - 2


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("source", ["m.pt", "s3://bucket/m.pt"])
def test_a_converted_file_goes_there_and_only_on_demand_over_another(buckets: Buckets, source: str, ckpt: Ckpt) -> None:
    assert ckpt("convert", source, "s3://bucket/out.pt").code == 0
    assert ckpt("diff", "m.pt", "s3://bucket/out.pt").code == 0
    there = buckets.bucket() / "out.pt"
    assert torch.equal(torch.load(there)["0.weight"], torch.load("m.pt")["0.weight"])
    there.write_bytes(b"old")
    again = ckpt("convert", source, "s3://bucket/out.pt")
    assert (again.code, again.err) == (
        2,
        "ckpt: s3://bucket/out.pt: it is there already\nhint: --force replaces it\n",
    )
    assert there.read_bytes() == b"old"
    assert ckpt("convert", source, "s3://bucket/out.pt", "--force").code == 0
    assert ckpt("diff", "m.pt", "s3://bucket/out.pt").code == 0


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("to", ["hf", "hf-bin", "dcp"])
def test_of_several_files_the_one_that_says_what_is_in_the_others_goes_last(
    buckets: Buckets, to: str, ckpt: Ckpt
) -> None:
    more = () if to == "dcp" else ("--max-shard", "100B")
    assert ckpt("convert", "m.pt", "s3://bucket/out/", "--to", to, *more).code == 0
    names = puts(buckets)
    assert names[-1].endswith(".metadata" if to == "dcp" else ".index.json")
    assert len(names) == len(written(buckets)) == (2 if to == "dcp" else 6)
    assert all(line.endswith(("apart", "")) for line in ckpt("diff", "m.pt", "s3://bucket/out").lines)
    assert ckpt("check", "s3://bucket/out").code == 0


@pytest.mark.usefixtures("work")
def test_at_any_time_at_most_one_shard_is_staged(buckets: Buckets, tmp_path: Path, ckpt: Ckpt) -> None:
    most = 0

    def look(_: Asked) -> None:
        nonlocal most
        most = max(most, len(list((tmp_path / "staging").rglob("*.safetensors"))))

    buckets.begin(before=look)
    assert ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B").code == 0
    assert most == 1


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("name", ["00001-of", "00003-of", "00005-of", INDEX])
def test_a_set_whose_upload_fails_leaves_nothing(buckets: Buckets, name: str, ckpt: Ckpt) -> None:
    fail_at(buckets, name)
    answer = ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B")
    assert answer.code == 2
    assert "access is denied (403)" in answer.err
    assert "Traceback" not in answer.err
    assert written(buckets) == []


@pytest.mark.usefixtures("work")
def test_a_forced_set_takes_the_place_of_another_one_and_of_its_files_only(buckets: Buckets, ckpt: Ckpt) -> None:
    assert ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B").code == 0
    (buckets.bucket() / "out" / "notes.txt").write_text("mine")
    refused = ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B")
    assert "it is there already" in refused.err
    torch.save({name: value + 1 for name, value in torch.load("m.pt").items() if value.dtype.is_floating_point}, "n.pt")
    buckets.begin()
    assert ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B", "--force").code == 0
    assert puts(buckets)[0] == f"DELETE {INDEX}"  # so that no reader takes a mix of both for a checkpoint
    buckets.begin()
    assert ckpt("convert", "n.pt", "s3://bucket/out/", "--max-shard", "200B", "--force").code == 0
    changes = puts(buckets)
    assert changes[-1].startswith("DELETE model-")
    assert changes.index(f"DELETE {INDEX}") < changes.index(f"PUT {INDEX}")
    assert ckpt("diff", "n.pt", "s3://bucket/out").code == 0
    weight_map = json.loads((buckets.bucket() / "out" / INDEX).read_text())["weight_map"]
    assert written(buckets) == sorted(f"out/{name}" for name in {*weight_map.values(), INDEX, "notes.txt"})


@pytest.mark.usefixtures("work")
def test_a_forced_set_that_fails_says_that_the_old_one_is_not_complete(buckets: Buckets, ckpt: Ckpt) -> None:
    assert ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B").code == 0
    fail_at(buckets, "00003-of")
    answer = ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B", "--force")
    assert answer.code == 2
    assert answer.err.splitlines()[0].endswith("the checkpoint that was there is not complete any more")
    assert f"out/{INDEX}" not in written(buckets)


EDITS = {
    "set": ("set", "SRC", "3.scale[0]=9"),
    "rename": ("rename", "SRC", "3.scale", "3.factor"),
    "rm": ("rm", "SRC", "4.columns"),
    "cast": ("cast", "SRC", "float16", "--lossy"),
}


@pytest.mark.parametrize("source", ["m.pt", "s3://bucket/m.pt", "set", "s3://bucket/set"])
@pytest.mark.parametrize("edit", list(EDITS))
def test_every_edit_writes_to_a_store_what_it_writes_to_the_disk(
    buckets: Buckets, work: Path, edit: str, source: str, ckpt: Ckpt
) -> None:
    command = [word.replace("SRC", source) for word in EDITS[edit]]
    name = "out" if source.endswith("set") else "out.pt"
    here, there = ckpt(*command, "-o", name), ckpt(*command, "-o", f"s3://bucket/{name}")
    assert here.code == there.code == 0, there.err
    assert there.out.replace("s3://bucket/out", "out") == here.out
    local = contract.contents(work / name)
    assert {name: len(data) for name, data in contract.contents(buckets.bucket() / name).items()} == {
        name: len(data) for name, data in local.items()
    }
    assert ckpt("diff", name, f"s3://bucket/{name}").code == 0
    if name == "out":
        names = puts(buckets)
        assert names[-1] == f"PUT {INDEX}"
        assert sorted(names) == sorted(f"PUT {each}" for each in local)


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("source", ["m.pt", "set"])
def test_an_edit_whose_upload_fails_leaves_nothing(buckets: Buckets, source: str, ckpt: Ckpt) -> None:
    name = "out" if source == "set" else "out.pt"
    fail_at(buckets, INDEX if source == "set" else "out.pt")
    answer = ckpt("rm", source, "4.columns", "-o", f"s3://bucket/{name}")
    assert (answer.code, "access is denied (403)" in answer.err) == (2, True)
    assert written(buckets) == []


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("number", [2, 4, 8, 14, 18])
def test_an_interrupt_leaves_nothing(buckets: Buckets, number: int, ckpt: Ckpt) -> None:
    buckets.begin(before=at_request(number - 1, interrupt))
    assert ckpt("convert", "m.pt", "s3://bucket/out/", "--max-shard", "100B").code == 130
    assert written(buckets) == []


@pytest.mark.usefixtures("work")
def test_a_place_without_room_for_a_file_is_refused_before_any_work(
    buckets: Buckets, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    for command in (("convert", "m.pt"), ("rm", "m.pt", "4.columns", "-o"), ("rm", "set", "4.columns", "-o")):
        answer = ckpt(*command, "s3://bucket/out")
        assert answer.code == 2
        assert "is written to" in answer.err
        assert "where 10 are free\nhint: TMPDIR=FOLDER" in answer.err
    assert puts(buckets) == []


@pytest.mark.usefixtures("work", "buckets")
@pytest.mark.parametrize("address", ["https://127.0.0.1:9/x.pt", "http://127.0.0.1:9/x.pt", "hf://lab/net/x.pt"])
@pytest.mark.parametrize("command", ["convert m.pt", "rm m.pt 4.columns -o", "show m.pt 0.weight -o"])
def test_what_is_not_written_to_is_refused_before_any_request(address: str, command: str, ckpt: Ckpt) -> None:
    answer = ckpt(*command.split(), address)
    scheme = address.partition(":")[0]
    assert answer.code == 2
    assert answer.err.startswith(f"ckpt: {address}: ckpt does not write to {scheme}://\nhint: write ")
    assert ("hf upload" in answer.err) == (scheme == "hf")


@pytest.mark.usefixtures("work")
def test_nothing_elsewhere_is_edited_in_place(buckets: Buckets, ckpt: Ckpt) -> None:
    before = contract.contents(buckets.bucket() / "set")
    for command in (("set", "s3://bucket/m.pt", "3.scale[0]=9"), ("rm", "s3://bucket/set", "4.columns")):
        answer = ckpt(*command)
        assert (answer.code, answer.err.splitlines()[-1]) == (2, "hint: -o OUT writes an edited copy")
    assert ckpt("undo", "s3://bucket/m.pt").code == ckpt("index", "s3://bucket/set").code == 2
    same = ckpt("rm", "s3://bucket/m.pt", "4.columns", "-o", "s3://bucket/m.pt")
    assert (same.code, "the output is the file itself" in same.err) == (2, True)
    assert contract.contents(buckets.bucket() / "set") == before
    assert puts(buckets) == []


def test_a_url_of_which_a_folder_was_mounted_is_not_taken_for_a_server() -> None:
    assert [new_folder.is_at_server(path) for path in ("s3://b/x", "x", "./s3://b/x", "C://x")] == [
        True, False, False, False,
    ]  # fmt: skip
