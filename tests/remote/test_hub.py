"""Checkpoints on the hub: names, revisions, one commit for a whole command, and who is let in."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from conftest import Ckpt
from fake_hub import TOKEN, Answer, Asked, FakeHub, serving
from huggingface_hub import HfApi
from safetensors.torch import save_file

import ckpt_cli
from ckpt_cli.errors import ChangedError, LimitError, NetworkError, UnsupportedError, UsageError
from ckpt_cli.remote import client
from ckpt_cli.remote.hub import HubStore, Place

REPO = "lab/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the environment names, for a user without a token."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def a_file(tmp_path: Path, value: float = 1.0, name: str = "model.pt") -> Path:
    """A checkpoint with one tensor of a value."""
    path = tmp_path / f"{value}-{name}"
    tensors = {"w": torch.full((4,), float(value))}
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    return path


def values_of(ckpt: Ckpt, address: str) -> str:
    """What `show` prints of it."""
    answer = ckpt("show", address, "w")
    assert (answer.code, answer.err) == (0, "")
    return answer.out.strip()


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("hf://o/r", Place("models", "o/r", "main", "")),
        ("hf://o/r/", Place("models", "o/r", "main", "")),
        ("hf://models/o/r/a.pt", Place("models", "o/r", "main", "a.pt")),
        ("hf://datasets/o/r@v1/x/a.pt", Place("datasets", "o/r", "v1", "x/a.pt")),
        ("hf://spaces/o/r", Place("spaces", "o/r", "main", "")),
        ("hf://o/r@refs/pr/1", Place("models", "o/r", "refs/pr/1", "")),
        ("hf://o/r@refs/pr/1/x/a.pt", Place("models", "o/r", "refs/pr/1", "x/a.pt")),
        ("hf://o/r@refs%2Fpr%2F1/a.pt", Place("models", "o/r", "refs/pr/1", "a.pt")),
        ("hf://o/r@refs/convert/parquet/a", Place("models", "o/r", "refs/convert/parquet", "a")),
        ("hf://o/r@feature%2Fnew/a.pt", Place("models", "o/r", "feature/new", "a.pt")),
        ("hf://o/r/a@b/c.pt", Place("models", "o/r", "main", "a@b/c.pt")),
        ("hf://o/r/ä b#c%20.pt", Place("models", "o/r", "main", "ä b#c%20.pt")),
    ],
)
def test_an_address_names_a_repository_a_revision_and_a_file(address: str, place: Place) -> None:
    assert Place.of(address) == place


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://gpt2", "hf://datasets/r", "hf://o/r@", "hf://o/r@/x", "hf://o/r x/y", "hf://buckets/o/b/x"],
)
def test_what_names_no_repository_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="not the address of a repository"):
        Place.of(address)


@pytest.mark.parametrize("address", ["hf://o/r@refs/pr/12/x/a.pt", "hf://datasets/o/r@a%2Fb/c@d", "hf://o/r/x@1.pt"])
def test_an_address_means_what_it_means_to_huggingface_hub(address: str) -> None:
    from huggingface_hub.utils import parse_hf_uri

    theirs, ours = parse_hf_uri(address), Place.of(address)
    assert (ours.kind, ours.repository, ours.name) == (f"{theirs.type}s", theirs.id, theirs.path_in_repo)
    assert ours.revision == (theirs.revision or "main")


@pytest.mark.parametrize("page", [2, 1000])
def test_a_list_is_that_of_huggingface_hub(hub: FakeHub, page: int) -> None:
    names = ["a.safetensors", "config.json", "s/b.pt", "s/t/c.bin", "s/t/d e#f%41.bin", "z.pt"]
    hub.page = page
    hub.commit(REPO, {name: name.encode() * 9 for name in names})
    theirs = {item.path: item for item in HfApi(hub.url, token=False).list_repo_tree(REPO, recursive=True)}
    store = HubStore()
    ours = dict(store.entries_below(f"hf://{REPO}"))
    assert ours.keys() == set(names)
    for name, version in ours.items():
        lfs = theirs[name].lfs
        assert (version.size, version.tag) == (theirs[name].size, lfs.sha256 if lfs else theirs[name].blob_id)
        found, data = store.begin(f"hf://{REPO}/{name}", 5)
        assert (found.version, data) == (version, (name.encode() * 9)[:5])
        read = bytearray(7)
        store.object_at(f"hf://{REPO}/{name}", version).read_into(memoryview(read), 2)
        assert bytes(read) == (name.encode() * 9)[2:9]
    assert {name: listed.is_folder for name, listed in store.entries_in(f"hf://{REPO}/s").items()} == {
        "b.pt": False,
        "t": True,
    }
    assert list(store.entries_in(f"hf://{REPO}", 2) or ()) == ["a.safetensors", "config.json"]
    assert store.entries_in(f"hf://{REPO}/none") == {}
    with pytest.raises(FileNotFoundError):
        store.begin(f"hf://{REPO}/none", 5)


def test_info_says_at_which_commit_it_was_read(hub: FakeHub, tmp_path: Path, ckpt: Ckpt) -> None:
    first = hub.commit(REPO, {"model.pt": a_file(tmp_path, 1)})
    second = hub.commit(REPO, {"model.pt": a_file(tmp_path, 2)})
    for address, commit in ((f"hf://{REPO}", second), (f"hf://{REPO}@{first}/model.pt", first)):
        assert json.loads(ckpt("info", "--json", address).out)["revision"] == commit
        lines = [line.split() for line in ckpt("info", address).lines]
        assert ["revision", commit] in lines
    assert "revision" not in ckpt("info", "--json", a_file(tmp_path, 1)).out


def test_every_revision_shows_its_own_values(hub: FakeHub, tmp_path: Path, ckpt: Ckpt) -> None:
    first = hub.commit(REPO, {"model.pt": a_file(tmp_path, 1)})
    hub.commit(REPO, {"model.pt": a_file(tmp_path, 2)})
    hub.commit(REPO, {"model.pt": a_file(tmp_path, 3)}, "refs/pr/1")
    hub.commit(REPO, {"model.pt": a_file(tmp_path, 4)}, "feature/new")
    hub.commit(f"datasets/{REPO}", {"model.pt": a_file(tmp_path, 5)})
    hub.repositories[REPO].refs["v1"] = first
    wanted = {
        "": 2,
        "@main": 2,
        "@v1": 1,
        f"@{first}": 1,
        "@refs/pr/1": 3,
        "@refs%2Fpr%2F1": 3,
        "@feature%2Fnew": 4,
    }
    for revision, value in wanted.items():
        assert values_of(ckpt, f"hf://{REPO}{revision}/model.pt") == f"tensor([{value}., {value}., {value}., {value}.])"
    assert values_of(ckpt, f"hf://datasets/{REPO}/model.pt") == "tensor([5., 5., 5., 5.])"
    assert ckpt("diff", f"hf://{REPO}@v1/model.pt", f"hf://{REPO}/model.pt").code == 1


def test_an_open_checkpoint_stays_at_its_commit_until_it_is_closed(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"model.pt": a_file(tmp_path, 1)})
    with ckpt_cli.open(f"hf://{REPO}/model.pt") as old:
        hub.commit(REPO, {"model.pt": a_file(tmp_path, 2)})
        hub.expire()
        with ckpt_cli.open(f"hf://{REPO}/model.pt") as new:
            assert (old["w"].numpy().tolist(), new["w"].numpy().tolist()) == ([1.0] * 4, [2.0] * 4)


def test_a_commit_is_asked_for_where_lists_do_not_say_it(hub: FakeHub, tmp_path: Path) -> None:
    hub.names_commit_in_lists = False
    first = hub.commit(REPO, {"model.pt": a_file(tmp_path, 1), "a": b"1"})
    store = HubStore()
    names = store.entries_in(f"hf://{REPO}")
    assert [asked.path for asked in hub.log] == [
        f"/api/models/{REPO}/tree/main",
        f"/api/models/{REPO}/revision/main",
        f"/api/models/{REPO}/tree/{first}",
    ]
    hub.commit(REPO, {"model.pt": a_file(tmp_path, 2)})
    assert store.entries_in(f"hf://{REPO}") == names
    assert store.begin(f"hf://{REPO}/a", 9)[1] == b"1"


def test_the_token_goes_to_the_hub_and_never_to_the_cdn(
    hub: FakeHub, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private.add(REPO)
    hub.commit(REPO, {"model.pt": a_file(tmp_path), "config.json": b"{}"})
    refused = ckpt("ls", f"hf://{REPO}/model.pt")
    assert (refused.code, refused.out) == (2, "")
    assert "there is no such repository, revision or folder, or it is not yours to read" in refused.err
    assert "hf auth login" in refused.err
    written = tmp_path / "home" / "token"
    written.parent.mkdir()
    written.write_text(f"{TOKEN}\n")
    elsewhere = tmp_path / "other"
    elsewhere.write_text(TOKEN)
    for variables in ({"HF_TOKEN": TOKEN}, {}, {"HF_HOME": "/none", "HF_TOKEN_PATH": str(elsewhere)}):
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            hub.forget()
            assert ckpt("ls", f"hf://{REPO}/model.pt").code == 0
            assert ckpt("info", f"hf://{REPO}").code == 0
            assert {each.authorization for each in hub.asked("hub")} == {f"Bearer {TOKEN}"}
            assert {each.authorization for each in hub.asked("cdn")} == {None}
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert ckpt("ls", f"hf://{REPO}/model.pt").code == 2


@pytest.mark.parametrize("token", ["hf_bad", "hf_\u00fc", "hf_a b", "hf_a\nX-Evil: 1"])
def test_a_wrong_token_is_refused_in_one_line_that_does_not_show_it(
    hub: FakeHub, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.commit(REPO, {"model.pt": a_file(tmp_path)})
    monkeypatch.setenv("HF_TOKEN", token)
    for name in (f"hf://{REPO}", f"hf://{REPO}/model.pt"):
        answer = ckpt("ls", name)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.count("ckpt: ") == 1
        assert token not in answer.err
        assert "Traceback" not in answer.err


@pytest.mark.parametrize("name", [f"hf://{REPO}@v9", f"hf://{REPO}@v9/model.pt", "hf://lab/none", "hf://lab/none/a.pt"])
def test_a_missing_repository_or_revision_is_told_from_a_missing_file(hub: FakeHub, ckpt: Ckpt, name: str) -> None:
    hub.commit(REPO, {"config.json": b"{}"})
    answer = ckpt("ls", name)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"ckpt: {name}: there is no such repository, revision or folder")
    missing = ckpt("ls", f"hf://{REPO}/model.pt")
    assert (missing.code, missing.err) == (2, f"ckpt: hf://{REPO}/model.pt: No such file or directory\n")


def test_a_hub_that_asks_to_wait_is_waited_for_and_a_token_is_the_hint(
    hub: FakeHub, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(client, "sleep", waited.append)
    hub.commit(REPO, {"model.pt": a_file(tmp_path)})
    hub.interrupt = lambda _: (429, {"Retry-After": "7"}, b"") if len(hub.log) < 3 else None
    assert ckpt("ls", f"hf://{REPO}/model.pt").code == 0
    assert waited == [7.0] * 3
    hub.interrupt = lambda _: (429, {}, b"")
    answer = ckpt("ls", f"hf://{REPO}/model.pt")
    assert (answer.code, "its server answers 429, 6 times" in answer.err, "HF_TOKEN" in answer.err) == (2, True, True)


def test_a_gated_repository_is_refused_with_what_lets_one_in(
    hub: FakeHub, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(REPO)
    hub.commit(REPO, {"model.pt": a_file(tmp_path)})
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        answer = ckpt("ls", f"hf://{REPO}/model.pt")
        assert (answer.code, answer.out) == (2, "")
        assert f"ask for access at {hub.url}/{REPO}" in answer.err
    hub.open_to.add(REPO)
    assert ckpt("ls", f"hf://{REPO}/model.pt").code == 0


def test_the_hub_is_not_asked_when_the_environment_says_offline(
    hub: FakeHub, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "1")
            for address in (f"hf://{REPO}", f"hf://{REPO}/model.pt"):
                answer = ckpt("ls", address)
                assert answer.code == 2
                assert answer.err.startswith(f"ckpt: {address}: {name} is set, so the hub is not asked\n")
    assert hub.log == []


def test_an_address_of_the_cdn_that_expired_is_resolved_once_more(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"model.pt": bytes(range(256)) * 9})
    found, _ = HubStore().begin(f"hf://{REPO}/model.pt", 4)
    read = bytearray(4)
    found.read_into(memoryview(read), 8)
    assert len(hub.asked("hub")) == 1
    hub.expire()
    found.read_into(memoryview(read), 300)
    assert bytes(read) == bytes([44, 45, 46, 47])
    assert [each.status for each in hub.log] == [302, 206, 206, 403, 302, 206]
    found.read_into(memoryview(read), 301)
    assert hub.log[-1].server == "cdn"
    assert len(hub.log) == 7


def test_a_file_of_another_content_at_the_same_commit_is_noticed(hub: FakeHub) -> None:
    sha = hub.commit(REPO, {"model.pt": bytes(1000), "b.json": b"{}"})
    store = HubStore()
    listed = store.entries_in(f"hf://{REPO}")
    found = [store.begin(f"hf://{REPO}/{name}", 1)[0] for name in listed]
    found += [store.object_at(f"hf://{REPO}/{name}", each.version) for name, each in listed.items() if each.version]
    hub.repositories[REPO].commits[sha].update({"model.pt": bytes([1]) * 1000, "b.json": b"[]"})
    hub.expire()
    for each in found:
        with pytest.raises(ChangedError):
            each.read_into(memoryview(bytearray(2)), 0)


def test_a_file_reads_the_same_in_another_process_without_its_token(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.private.add(REPO)
    hub.commit(REPO, {"model.pt": bytes(range(100))})
    found, _ = HubStore().begin(f"hf://{REPO}/model.pt", 4)
    sent = pickle.dumps(found)
    assert TOKEN.encode() not in sent
    hub.forget()
    read = bytearray(3)
    pickle.loads(sent).read_into(memoryview(read), 50)
    assert bytes(read) == bytes([50, 51, 52])
    assert [each.server for each in hub.log] == ["cdn"]
    hub.expire()
    pickle.loads(sent).read_into(memoryview(read), 60)
    assert bytes(read) == bytes([60, 61, 62])


@pytest.mark.parametrize("page", [b"<html>", b"{}", b"[" * 100_000, b"\xff", b""])
def test_what_is_no_list_is_refused(hub: FakeHub, page: bytes) -> None:
    sha = hub.commit(REPO, {"a.pt": b""})
    hub.interrupt = lambda _: (200, {"X-Repo-Commit": sha}, page)
    with pytest.raises(NetworkError, match="something else than the hub does"):
        HubStore().entries_in(f"hf://{REPO}")


def test_entries_of_a_list_that_lead_elsewhere_or_say_no_size_are_left_out(hub: FakeHub) -> None:
    sha = hub.commit(REPO, {"a.pt": b""})
    odd = [1, None, {}, {"path": 3}, {"type": "file", "path": "big", "size": 2**63}, {"type": "link", "path": "x"}]
    odd += [{"type": "file", "path": path, "size": 1} for path in ("s/../x", "/x", "s//x", "s/.", "t/x", "s/b", "")]
    odd += [{"type": "file", "path": "s/a", "size": size} for size in (-1, "1", 1.5, True, None)]
    hub.interrupt = lambda _: (200, {"X-Repo-Commit": sha}, json.dumps(odd).encode())
    assert list(HubStore().entries_in(f"hf://{REPO}/s")) == ["b"]


@pytest.mark.parametrize(("count", "error"), [(20_000, LimitError), (0, NetworkError)])
def test_a_list_that_does_not_end_meets_a_limit(hub: FakeHub, count: int, error: type[Exception]) -> None:
    sha = hub.commit(REPO, {"a.pt": b""})
    page = json.dumps([{"type": "file", "path": f"f{number}", "size": 1} for number in range(count)]).encode()

    def endless(asked: Asked) -> Answer:
        link = f'<https://example.org{asked.path}?cursor={len(hub.log)}>; rel="next"'
        return 200, {"X-Repo-Commit": sha, "Link": link}, page

    hub.interrupt = endless
    with pytest.raises(error):
        HubStore().entries_in(f"hf://{REPO}")


def test_the_hub_is_not_written_to_and_the_hint_says_what_does(hub: FakeHub) -> None:
    with pytest.raises(UnsupportedError) as error, HubStore().upload(f"hf://{REPO}/x.pt", replace=True):
        pass
    assert str(error.value.hint).endswith(f"hf upload {REPO} OUT")


def test_all_of_a_command_is_of_one_commit_when_the_branch_moves_on(hub: FakeHub, tmp_path: Path, ckpt: Ckpt) -> None:
    parts = {f"model-{n:05}-of-00003.safetensors": n for n in (1, 2, 3)}
    for value in (10, 20):
        folder = tmp_path / str(value)
        folder.mkdir()
        for name, n in parts.items():
            save_file({f"w{n}": torch.full((3,), float(value + n))}, folder / name)
    hub.commit(REPO, tmp_path / "10")
    wanted = ckpt("show", f"hf://{REPO}").out
    for count in range(1, len(hub.log)):
        hub.repositories.clear()
        hub.commit(REPO, tmp_path / "10")
        hub.forget()

        begun: list[Asked] = []
        once = Lock()

        def move(asked: Asked, at: int = count, begun: list[Asked] = begun, once: Any = once) -> None:
            begun.append(asked)
            if len(begun) > at and once.acquire(blocking=False):  # requests come side by side
                hub.commit(REPO, tmp_path / "20")

        hub.interrupt = move
        assert ckpt("show", f"hf://{REPO}").out == wanted
        assert len(hub.repositories[REPO].commits) == (2 if len(begun) > count else 1)
    assert count >= 6  # a list, a redirect and a file for each shard; how many more depends on what is fetched early
