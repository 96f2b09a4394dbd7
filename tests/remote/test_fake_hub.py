"""The hub of the tests, held against huggingface_hub: what that reads from it is what was put there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, serving
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "lab/model"
FILES: dict[str, bytes | Path] = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 100,
    "sub/deep/data.bin": b"1234",
    "empty.pt": b"",
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub with one repository."""
    with serving() as hub:
        hub.commit(REPO, FILES)
        yield hub


def api(hub: FakeHub, token: str | bool = False) -> HfApi:
    """huggingface_hub's client for it."""
    return HfApi(endpoint=hub.url, token=token)


def test_its_lists_have_every_file_with_its_size_also_over_several_pages(hub: FakeHub) -> None:
    hub.page = 2
    listed = {item.path: item for item in api(hub).list_repo_tree(REPO, recursive=True)}
    assert listed.keys() == {*FILES, "sub", "sub/deep"}
    assert {name: listed[name].size for name in FILES} == {name: len(data) for name, data in FILES.items()}
    assert len(hub.asked("hub", "/tree/")) == 3
    assert [item.path for item in api(hub).list_repo_tree(REPO)] == [
        "config.json",
        "empty.pt",
        "model.safetensors",
        "sub",
    ]
    assert [item.path for item in api(hub).list_repo_tree(REPO, "sub/deep")] == ["sub/deep/data.bin"]


def test_every_revision_leads_to_its_own_commit(hub: FakeHub, tmp_path: Path) -> None:
    first = api(hub).repo_info(REPO).sha
    second = hub.commit(REPO, {"config.json": b"{...}"})
    proposed = hub.commit(REPO, {"config.json": b"[]"}, "refs/pr/1")
    hub.repositories[REPO].refs["v1"] = str(first)
    wanted = {"main": second, "v1": first, "refs/pr/1": proposed, str(first): first}
    assert {revision: api(hub).repo_info(REPO, revision=revision).sha for revision in wanted} == wanted
    for revision, size in (("main", 5), ("v1", 2), ("refs/pr/1", 2)):
        (config,) = api(hub).get_paths_info(REPO, "config.json", revision=revision)
        assert config.size == size
    path = api(hub).hf_hub_download(REPO, "config.json", revision="refs/pr/1", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"[]"


def test_files_come_from_the_cdn_without_the_token_or_by_a_redirect_within_the_hub(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.private.add(REPO)
    for name, data in FILES.items():
        path = api(hub, TOKEN).hf_hub_download(REPO, name, cache_dir=tmp_path)
        assert Path(path).read_bytes() == data
    assert hub.asked("cdn")
    assert {each.authorization for each in hub.asked("cdn")} == {None}
    assert {each.authorization for each in hub.asked("hub")} == {f"Bearer {TOKEN}"}
    facts = api(hub, TOKEN).get_hf_file_metadata(url=f"{hub.url}/{REPO}/resolve/main/model.safetensors", token=TOKEN)
    assert (facts.size, facts.commit_hash) == (25600, api(hub, TOKEN).repo_info(REPO).sha)


def test_it_refuses_as_the_hub_does(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    with pytest.raises(GatedRepoError):
        api(hub).hf_hub_download(REPO, "config.json", cache_dir=tmp_path)
    with pytest.raises(GatedRepoError):
        api(hub, TOKEN).hf_hub_download(REPO, "config.json", cache_dir=tmp_path)
    assert list(api(hub).list_repo_tree(REPO))
    hub.open_to.add(REPO)
    assert api(hub, TOKEN).hf_hub_download(REPO, "config.json", cache_dir=tmp_path)
    hub.gated.clear()
    with pytest.raises(RemoteEntryNotFoundError):
        api(hub).hf_hub_download(REPO, "none.pt", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        list(api(hub).list_repo_tree(REPO, revision="v9"))
    hub.private.add(REPO)
    for repository in (REPO, "lab/none"):
        with pytest.raises(RepositoryNotFoundError):
            api(hub).repo_info(repository)
