"""Objects read from a store by ranges of one version, and lists of folders; against a server of S3 on loopback."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import localbucket  # type: ignore[import-untyped]
import pytest
from buckets import SECRETS, Buckets

from ckpt_cli import limits
from ckpt_cli.errors import ChangedError, CkptError, LimitError, NetworkError, UnsupportedError, UsageError
from ckpt_cli.remote import cloud, cloud_requests
from ckpt_cli.remote.cloud import CloudObject, store
from ckpt_cli.remote.cloud_access import split_url
from ckpt_cli.remote.store import Version

DATA = bytes(range(256)) * 4096
URL = "s3://bucket/run/x.bin"


@pytest.fixture
def data(buckets: Buckets) -> Path:
    """A file of 1 MiB in the bucket."""
    path = buckets.bucket() / "run" / "x.bin"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pauses between tries."""
    monkeypatch.setattr(cloud_requests, "_PAUSES", (0.0,) * len(cloud_requests._PAUSES))


def opened() -> CloudObject:
    return store("s3").begin(URL, 100)[0]


def read(found: CloudObject, begin: int, end: int) -> bytes:
    buffer = bytearray(end - begin)
    found.read_into(memoryview(buffer), begin)
    return bytes(buffer)


@pytest.mark.usefixtures("data")
def test_one_request_gives_the_beginning_the_size_and_the_version(buckets: Buckets) -> None:
    found, head = store("s3").begin(URL, 1000)
    assert head == DATA[:1000]
    assert found.version.size == len(DATA)
    assert found.version.tag
    assert [asked.range for asked in buckets.asked] == ["bytes=0-999"]
    assert read(found, 5000, 70_000) == DATA[5000:70_000]
    assert buckets.asked[-1].range == "bytes=5000-69999"


def test_a_range_may_have_any_length_in_parts_of_8_mib(buckets: Buckets) -> None:
    data = os.urandom(20 << 20)
    (buckets.bucket() / "big").write_bytes(data)
    found, head = store("s3").begin("s3://bucket/big", 1 << 30)
    assert head == data
    buckets.begin()
    assert read(found, 1, len(data)) == data[1:]
    assert len(buckets.asked) == 3


def test_an_object_without_bytes_opens(buckets: Buckets) -> None:
    (buckets.bucket() / "empty").touch()
    found, head = store("s3").begin("s3://bucket/empty", 100)
    assert (found.version.size, head) == (0, b"")
    assert len(buckets.asked) == 2


@pytest.mark.parametrize("url", ["s3://bucket/none", "s3://nobucket/none", "s3://bucket", "s3://bucket/"])
@pytest.mark.usefixtures("buckets")
def test_what_is_not_there_is_not_found(url: str) -> None:
    with pytest.raises(FileNotFoundError):
        store("s3").begin(url, 100)


def test_another_object_is_noticed_by_its_tag_or_its_time_where_there_is_no_tag(buckets: Buckets, data: Path) -> None:
    for exact in (True, False):
        for fault in ("", "noetag", "emptytag"):
            buckets.exact = exact
            buckets.begin(fault=fault)
            found = opened()
            data.write_bytes(DATA[::-1])
            os.utime(data, (1, 1))
            with pytest.raises(ChangedError, match="became another file"):
                read(found, 0, 100)
            data.write_bytes(DATA)


def test_an_object_that_is_gone_or_shorter_became_another_one(data: Path) -> None:
    found = opened()
    data.write_bytes(DATA[:50])
    with pytest.raises(ChangedError):
        read(found, 100, 200)
    data.unlink()
    with pytest.raises(ChangedError):
        read(found, 100, 200)


@pytest.mark.usefixtures("data")
def test_an_object_of_a_list_is_opened_without_a_request_and_checked_by_the_first_reply(buckets: Buckets) -> None:
    s3 = store("s3")
    version = s3.entries_in("s3://bucket/run")["x.bin"].version
    assert version is not None
    buckets.begin()
    found = s3.object_at(URL, version)
    assert not buckets.asked
    assert read(found, 3, 9) == DATA[3:9]
    with pytest.raises(ChangedError):
        read(s3.object_at(URL, Version(version.size, "other")), 0, 9)


@pytest.mark.usefixtures("data")
def test_an_object_sent_to_another_process_reads_the_same_version_and_has_no_secrets() -> None:
    found = opened()
    sent = pickle.dumps(found)
    assert not any(secret.encode() in sent for secret in SECRETS)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(read, found, 10, 20).result() == DATA[10:20]


@pytest.mark.usefixtures("data")
def test_a_forked_process_is_refused_instead_of_waiting_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(UnsupportedError, match="forked"):
        read(found, 0, 9)


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 20 names in the place of 1,000."""
    monkeypatch.setattr(localbucket, "MAX_KEYS_LIMIT", 20)
    monkeypatch.setattr(cloud, "_PAGE", 20)


def _touch(buckets: Buckets, *names: str) -> None:
    for name in names:
        path = buckets.bucket() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_a_list_has_files_with_versions_and_folders(buckets: Buckets) -> None:
    _touch(buckets, "run/a", "run/.metadata", "run/sub/b", "run/sub/deep/c", "runner")
    found = store("s3").entries_in("s3://bucket/run/")
    assert {name: entry.is_folder for name, entry in found.items()} == {".metadata": False, "a": False, "sub": True}
    assert found["a"].version is not None
    assert found["a"].version.size == 5
    assert len(buckets.asked) == 1
    assert [name for name, _ in store("s3").entries_below("s3://bucket/run")] == [
        ".metadata", "a", "sub/b", "sub/deep/c",
    ]  # fmt: skip


@pytest.mark.usefixtures("buckets")
def test_a_folder_that_is_not_there_has_no_entries() -> None:
    assert store("s3").entries_in("s3://bucket/none") == {}
    assert store("s3").entries_in("s3://nobucket/none") == {}
    assert list(store("s3").entries_below("s3://bucket/none")) == []


@pytest.mark.usefixtures("_small_pages")
def test_a_large_subfolder_is_left_after_a_page(buckets: Buckets) -> None:
    _touch(buckets, *(f"{step}/{number}" for step in ("a", "b") for number in range(46)), "z")
    assert list(store("s3").entries_in("s3://bucket")) == ["a", "b", "z"]
    assert len(buckets.asked) < 6


def test_a_list_ends_at_its_limit_and_at_what_is_wanted(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(buckets, *(f"run/{number:04}" for number in range(30)))
    assert len(store("s3").entries_in("s3://bucket/run", 7)) == 7
    monkeypatch.setattr(limits, "LISTED", 20)
    with pytest.raises(LimitError, match="more than 20 names"):
        store("s3").entries_in("s3://bucket/run")
    with pytest.raises(LimitError, match="more than 20 files"):
        list(store("s3").entries_below("s3://bucket/run"))


# --- faults ----------------------------------------------------------------------------------------------------------

PASSING = ("503", "500", "429", "408", "reset", "short")
REFUSED = {
    "403": "access is denied (403)",
    "401": "access is denied (401)",
    "whole": "does not give parts of a file, only all of it",
    "wrongrange": "another part of the file than it is asked for",
    "400": "its server answers 400",
}


def _message(error: BaseException) -> str:
    text = f"{error} {getattr(error, 'hint', '')}"
    assert "\n" not in text
    assert not any(secret in text for secret in (*SECRETS, "127.0.0.1", "Generic", "Error performing"))
    return text


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("fault", [*PASSING, *REFUSED, "etag", "404", "416", "412", "huge", "endless", "to:", "gzip"])
@pytest.mark.usefixtures("data")
def test_every_fault_at_every_request_gives_the_right_answer_or_one_line(
    buckets: Buckets, fault: str, after: int
) -> None:
    s3 = store("s3")
    buckets.begin(fault=fault, after=after, times=2, match=lambda asked: asked.range is not None)
    try:
        found, head = s3.begin(URL, 100)
        assert (head, read(found, 7, 900_000), read(found, 0, 10)) == (DATA[:100], DATA[7:900_000], DATA[:10])
    except (CkptError, FileNotFoundError) as error:
        assert fault not in PASSING
        _message(error)


@pytest.mark.parametrize(("fault", "said"), list(REFUSED.items()))
@pytest.mark.usefixtures("data")
def test_what_does_not_pass_is_not_tried_again(buckets: Buckets, fault: str, said: str) -> None:
    found = opened()
    buckets.begin(fault=fault)
    with pytest.raises(NetworkError) as error:
        read(found, 5, 50_000)
    assert said in _message(error.value)
    assert len(buckets.asked) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("503", "its server answers 503, 6 times"),
        ("reset", "the connection was reset, 6 times"),
        ("to:http://127.0.0.1:9/", "cannot be reached: Connection refused, 6 times"),
    ],
)
@pytest.mark.usefixtures("data")
def test_what_does_not_end_is_reported_after_six_tries(buckets: Buckets, fault: str, said: str) -> None:
    found = opened()
    buckets.begin(fault=fault)
    with pytest.raises(NetworkError) as error:
        read(found, 5, 50_000)
    assert said in _message(error.value)
    assert len(buckets.asked) == 6


def test_a_reading_goes_on_where_it_broke_off_however_often_that_is(buckets: Buckets, data: Path) -> None:
    whole = DATA * 8
    data.write_bytes(whole)
    found = opened()
    buckets.begin(fault="short", times=7)
    assert read(found, 0, len(whole)) == whole
    begins = [int(str(asked.range).removeprefix("bytes=").partition("-")[0]) for asked in buckets.asked]
    assert len(begins) == 8
    assert begins == sorted(set(begins))


@pytest.mark.usefixtures("_small_pages")
def test_a_list_is_asked_for_again_from_where_it_broke_off(buckets: Buckets) -> None:
    _touch(buckets, *(f"run/{number:04}" for number in range(50)))
    for after in range(3):
        buckets.begin(fault="reset", after=after, times=1)
        assert len(store("s3").entries_in("s3://bucket/run")) == 50


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "abfss://@account.dfs.core.windows.net/x"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="names no bucket"):
        split_url(url)


def test_the_forms_of_urls() -> None:
    assert [split_url(url) for url in ("s3://b/a/c", "gs://b", "abfs://c/x/")] == [
        (split_url("s3://b")[0], "a/c"), (split_url("gs://b/x")[0], ""), (split_url("az://c/y")[0], "x"),
    ]  # fmt: skip
    bucket, key = split_url("abfss://c@account.dfs.core.windows.net/a/b.pt")
    assert (bucket.scheme, bucket.name, bucket.account, key) == ("az", "c", "account", "a/b.pt")
