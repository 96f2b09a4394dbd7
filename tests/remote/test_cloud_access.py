"""Who asks an object store, and where it is: environment, profiles of the AWS tools, nobody; and Google's requests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from buckets import SECRETS, Buckets
from conftest import Ckpt

from ckpt_cli.errors import CkptError, NetworkError, UnsupportedError
from ckpt_cli.remote import cloud_access
from ckpt_cli.remote.cloud import store

URL = "s3://bucket/x"


@pytest.fixture(autouse=True)
def _object(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object to read, on a machine that is none of a cloud's, and no credentials in the environment."""
    (buckets.bucket() / "x").write_bytes(b"data")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_METADATA_ENDPOINT"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(cloud_access, "_is_on", lambda *_: False)
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the AWS tools, in which `config` and `credentials` lie."""
    folder = tmp_path / "aws"
    folder.mkdir()
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    return folder


def signature(buckets: Buckets, url: str = URL) -> str:
    """Who asked for an object, and for which region."""
    buckets.begin()
    assert store(url.partition(":")[0]).begin(url, 9)[1] == b"data"
    return buckets.asked[-1].signature


def refusal(url: str = URL) -> str:
    """Why an object is not read, in one line, with the hint."""
    with pytest.raises(CkptError) as error:
        store(url.partition(":")[0]).begin(url, 9)
    said = f"{error.value} | {error.value.hint}"
    assert not any(secret in said for secret in (*SECRETS, "\n", "169.254", "127.0.0.1"))
    return said


def test_without_credentials_requests_are_not_signed_and_nobody_is_asked_for_any(buckets: Buckets) -> None:
    assert signature(buckets) == ""
    assert len(buckets.asked) == 1


def test_where_they_are_to_be_had_but_are_not_given_it_is_asked_once_without(
    buckets: Buckets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    assert signature(buckets) == ""
    buckets.begin(fault="403")
    assert refusal().startswith("s3://bucket/x: access is denied (403), and there are no credentials | who you are")
    assert len(buckets.asked) == 1


def test_access_that_is_denied_has_a_hint_for_the_scheme(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    buckets.begin(fault="403")
    assert refusal().endswith("AWS_PROFILE and ~/.aws, or from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
    assert refusal().startswith("s3://bucket/x: access is denied (403) | ")


def test_a_profile_says_who_asks_and_where(buckets: Buckets, aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (aws / "credentials").write_text(
        "[default]\naws_access_key_id = DEFAULTKEY\naws_secret_access_key = s\n"
        "[lab]\naws_access_key_id=LABKEY\naws_secret_access_key=a%b\naws_session_token=t\n"
    )
    (aws / "config").write_text(
        "[default]\nregion = eu-west-3\n[profile lab]\nregion=ap-south-1\ns3 =\n  addressing_style = path\n"
        f"[profile near]\nendpoint_url = {buckets.url}\naws_access_key_id=NEARKEY\naws_secret_access_key=s\n"
    )
    assert signature(buckets) == "DEFAULTKEY/eu-west-3"
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert signature(buckets) == "LABKEY/ap-south-1"
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert signature(buckets) == "LABKEY/us-west-2"
    monkeypatch.setenv("AWS_PROFILE", "near")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert signature(buckets) == "NEARKEY/us-west-2"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert signature(buckets) == "ENVKEY/us-west-2"


def test_a_profile_that_is_not_there_or_cannot_be_understood_is_reported(
    aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert refusal() == "s3://bucket/x: there is no profile 'nobody' in ~/.aws/config | AWS_PROFILE names one"
    (aws / "config").write_text("no section\n")
    assert "the settings of the AWS tools cannot be understood" in refusal()


@pytest.mark.parametrize("setting", ["sso_session = x", "role_arn = y", "credential_process = z"])
def test_a_profile_that_signs_in_needs_boto3(
    buckets: Buckets, aws: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (aws / "config").write_text(f"[default]\n{setting}\nregion = eu-west-1\n")
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert "for which the package boto3 is needed | pip install boto3, or: eval" in refusal()
    keys = SimpleNamespace(access_key="ROLEKEY", secret_key="s", token="t")
    credentials = SimpleNamespace(get_frozen_credentials=lambda: keys)
    boto3 = ModuleType("boto3")
    boto3.Session = lambda: SimpleNamespace(get_credentials=lambda: credentials)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "boto3", boto3)
    assert signature(buckets) == "ROLEKEY/eu-west-1"
    boto3.Session = lambda: SimpleNamespace(get_credentials=lambda: None)  # type: ignore[attr-defined]
    assert "the profile does not sign in | aws sso login" in refusal()


def test_a_bucket_of_another_region_is_asked_there_or_the_line_says_so(
    buckets: Buckets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    buckets.begin(fault="301")
    assert refusal() == "s3://bucket/x: its bucket is in another region | AWS_REGION names a region"
    monkeypatch.setattr("ckpt_cli.remote.cloud.region_of", lambda _: "sa-east-1")
    buckets.begin(fault="301", times=1)
    assert store("s3").begin(URL, 9)[1] == b"data"
    assert [asked.signature for asked in buckets.asked] == ["KEY/us-east-1", "KEY/sa-east-1"]


def test_keys_that_are_not_complete_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    assert refusal().startswith("s3://bucket/x: its settings in the environment are not complete or not valid | who")
    assert refusal("az://container/x").startswith("az://container/x: no storage account is named | who you are")


def test_without_obstore_the_hint_says_what_to_install(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for url in ("s3://b/x", "gs://b/x", "az://b/x", "abfss://b@a.dfs.core.windows.net/x"):
        answer = ckpt("ls", url)
        assert (answer.code, answer.err) == (
            2,
            f"ckpt: {url}: object stores need the package obstore\nhint: pip install 'ckpt-edit[remote]'\n",
        )
    with pytest.raises(UnsupportedError), store("s3").upload(URL, replace=True):
        pass


@pytest.mark.parametrize("token", [None, "TOKEN"])
def test_google_is_read_and_written_by_the_same_requests(
    buckets: Buckets, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", buckets.url)
    if token is not None:
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", token)
    gs = store("gs")
    assert signature(buckets, "gs://bucket/x") == ""
    assert list(gs.entries_in("gs://bucket")) == ["x"]
    for nbytes in (10, 17 << 20):
        with gs.upload("gs://bucket/run/y", replace=True, nbytes=nbytes) as upload:
            upload.write(memoryview(bytes(nbytes)))
            assert upload.done().size == nbytes
    gs.remove("gs://bucket/run/y")
    assert buckets.names() == ["x"]
    buckets.begin(fault="403")
    assert "access is denied (403)" in refusal("gs://bucket/x")
    with pytest.raises(NetworkError):
        gs.entries_in("gs://bucket")
