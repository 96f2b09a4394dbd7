"""Connections to buckets: which bucket a URL names, where its server is, and who asks.

obstore takes keys from the environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`). What it does not do is here: profiles in
`~/.aws`, and asking nobody for credentials where nothing says that there are any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ckpt_cli.errors import NetworkError, UnsupportedError, UsageError
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSCredential, GCSStore, S3Credential, S3Store

    Client = S3Store | GCSStore | AzureStore

READ_SECONDS = 20
"""Seconds without a byte after which a server does not answer."""

REQUEST_SECONDS = 120
"""Seconds of one request, which has at most one part of a file."""

LIST_SECONDS = 30
"""Seconds of a request for a page of a list: obstore keeps all of the reply, however long it is."""

UPLOAD_TRIES = 6
"""Times that a part is sent before an upload fails."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of S3 or Google Cloud Storage, or a container of Azure."""

    scheme: str
    """`s3`, `gs` or `az`."""
    name: str
    account: str = ""
    """The storage account of Azure where the URL has one; else the environment says it."""


def split_url(url: str) -> tuple[Bucket, str]:
    """Return the bucket that a URL names, and the name of the object in it; raises UsageError where it names none.

    `abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/NAME` is the form that Hadoop uses for Azure.
    """
    scheme, _, rest = url.partition("://")
    name, _, key = rest.partition("/")
    account = ""
    if scheme in ("abfs", "abfss"):
        name, _, host = name.partition("@")
        account = host.partition(".")[0]
        scheme = "az"
    if not name:
        raise UsageError("names no bucket", path=url, hint=f"{scheme}://BUCKET/NAME")
    return Bucket(scheme, name, account), key.rstrip("/")


@dataclass(frozen=True, slots=True)
class Access:
    """How a bucket is reached, and by whom."""

    client: Client
    """For reading; it tries nothing twice, as ckpt does that itself."""
    make_lister: Callable[[], Client]
    make_uploader: Callable[[], Client]
    is_anonymous: bool
    """True if requests are not signed."""
    region: str = ""
    """The region that its server said it is in; empty where the settings say it."""
    _others: dict[str, Client] = field(default_factory=dict)

    @property
    def lister(self) -> Client:
        """For lists and what else has short replies; made when it is first asked for, as each client takes 4 ms."""
        if "lister" not in self._others:
            self._others["lister"] = self.make_lister()
        return self._others["lister"]

    @property
    def uploader(self) -> Client:
        """For writing; it sends a part several times if it has to."""
        if "uploader" not in self._others:
            self._others["uploader"] = self.make_uploader()
        return self._others["uploader"]


def require_obstore(url: str) -> None:
    """Raise UnsupportedError where obstore is not installed."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "object stores need the package obstore", path=url, hint="pip install 'ckpt-edit[remote]'"
        ) from None


def access_to(bucket: Bucket, url: str, *, anonymous: bool = False, region: str = "") -> Access:
    """Return the access to a bucket, without a request; raises UnsupportedError where obstore is not installed.

    Raises NetworkError where the settings of the environment or of a profile are of no use.
    """
    require_obstore(url)
    from obstore import store as stores

    provider: Callable[[], S3Credential | GCSCredential] | None
    settings, makes = _settings(bucket, url), {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
    if region:
        settings.config["region"] = region
    is_anonymous = anonymous or not settings.has_credentials
    if is_anonymous:
        settings.config["skip_signature"] = "true"
    provider = settings.provider
    if is_anonymous:  # obstore asks for credentials before it writes to Google, even where it signs nothing
        provider = _nobody if bucket.scheme == "gs" else None
    more = {} if provider is None else {"credential_provider": provider}

    def client(options: Mapping[str, Any], tries: int) -> Client:
        make: Any = makes[bucket.scheme]
        made: Client = make(
            bucket.name,
            config=settings.config,
            client_options={"allow_http": settings.is_plain, "user_agent": "ckpt", **options},
            retry_config={"max_retries": tries - 1, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)},
            **more,
        )
        return made

    silence = timedelta(seconds=READ_SECONDS)
    waits = {"timeout": timedelta(seconds=REQUEST_SECONDS), "connect_timeout": silence}
    try:
        reads = client({**waits, "read_timeout": silence}, 1)
    except Exception as error:
        raise NetworkError(_useless(bucket, error), path=url, hint=WHO[bucket.scheme]) from None
    lists = {**waits, "timeout": timedelta(seconds=LIST_SECONDS)}
    return Access(reads, lambda: client(lists, 1), lambda: client(waits, UPLOAD_TRIES), is_anonymous, region)


def _nobody() -> GCSCredential:
    """Return the credentials of nobody."""
    return {"token": "", "expires_at": None}


def _useless(bucket: Bucket, error: Exception) -> str:
    """Return what is wrong with settings that obstore does not take, without their values."""
    text = str(error).partition("\n")[0].lower()
    if bucket.scheme == "az" and "account" in text and "must be specified" in text:
        return "no storage account is named"
    return "its settings in the environment are not complete or not valid"


WHO = {
    "s3": "who you are is taken from AWS_PROFILE and ~/.aws, or from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "who you are is taken from GOOGLE_APPLICATION_CREDENTIALS, or from: gcloud auth application-default login",
    "az": "who you are is taken from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN; AZURE_USE_AZURE_CLI=true asks az",
}
"""The hint for each scheme where access is denied."""


def region_of(bucket: Bucket) -> str:
    """Ask Amazon for the region that a bucket is in, without saying who asks; empty where that is not known."""
    if bucket.scheme != "s3" or _set(*_ENDPOINTS):
        return ""
    import urllib3

    with suppress(urllib3.exceptions.HTTPError):
        reply = urllib3.request(
            "HEAD", f"https://s3.amazonaws.com/{quote(bucket.name)}", redirect=False, retries=2, timeout=READ_SECONDS
        )
        return re.sub("[^a-z0-9-]", "", reply.headers.get("x-amz-bucket-region", ""))[:40]
    return ""


# --- settings --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Settings:
    """What a client of a bucket is made with."""

    config: dict[str, Any]
    has_credentials: bool = True
    """True if something says who asks, or where credentials are to be had."""
    is_plain: bool = False
    """True if the server was named by `http://`."""
    provider: Callable[[], S3Credential] | None = None


def _settings(bucket: Bucket, url: str) -> _Settings:
    return {"s3": _s3, "gs": _gs, "az": _az}[bucket.scheme](bucket, url)


def _set(*names: str) -> bool:
    """True if one of some variables is set in the environment."""
    return any(os.environ.get(name) for name in names)


def _is_on(*words: str) -> bool:
    """True if the firmware names the machine as one of a cloud's; no server is asked."""
    for name in ("sys_vendor", "product_name", "chassis_asset_tag"):
        try:
            text = Path("/sys/class/dmi/id", name).read_text(errors="replace").strip()
        except OSError:
            continue
        if text in words:
            return True
    return False


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Variables that name another server than Amazon's, the first one counting most."""


def _s3(bucket: Bucket, url: str) -> _Settings:  # noqa: ARG001 - as all have it
    settings = _Settings({"disable_bulk_delete": "true"})  # which not every server has
    profile = _profile(url)
    named = (os.environ[name] for name in _ENDPOINTS if os.environ.get(name))
    endpoint = next(named, profile.get("endpoint_url", ""))
    if endpoint:
        settings.config["aws_endpoint_url_s3"] = endpoint
        settings.is_plain = endpoint.startswith("http://")
    if "region" in profile and not _set("AWS_REGION", "AWS_DEFAULT_REGION"):
        settings.config["region"] = profile["region"]
    if _set("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        return settings
    if "aws_access_key_id" in profile and "aws_secret_access_key" in profile:
        settings.config["access_key_id"] = profile["aws_access_key_id"]
        settings.config["secret_access_key"] = profile["aws_secret_access_key"]
        if "aws_session_token" in profile:
            settings.config["session_token"] = profile["aws_session_token"]
    elif profile.keys() & _SIGNS_IN:
        settings.provider = _signed_in(url)
    else:
        asked = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_METADATA_ENDPOINT",
                 "AWS_CONTAINER_CREDENTIALS_FULL_URI")  # fmt: skip
        is_off = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        settings.has_credentials = _set(*asked) or (not is_off and _is_on("Amazon EC2"))
    return settings


def _gs(bucket: Bucket, url: str) -> _Settings:  # noqa: ARG001
    settings = _Settings({})
    settings.is_plain = os.environ.get("GOOGLE_BASE_URL", "").startswith("http://")
    named = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY", "GCE_METADATA_HOST",
             "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_BEARER_TOKEN")  # fmt: skip
    logged_in = Path("~/.config/gcloud/application_default_credentials.json").expanduser()
    settings.has_credentials = _set(*named) or logged_in.is_file() or _is_on("Google", "Google Compute Engine")
    return settings


def _az(bucket: Bucket, url: str) -> _Settings:  # noqa: ARG001
    settings = _Settings({"account_name": bucket.account} if bucket.account else {})
    endpoints = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    settings.is_plain = any(os.environ.get(name, "").startswith("http://") for name in endpoints)
    named = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY", "AZURE_STORAGE_TOKEN",
             "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID",
             "AZURE_FEDERATED_TOKEN_FILE", "AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT", "AZURE_USE_AZURE_CLI",
             "AZURE_STORAGE_USE_AZURE_CLI", "AZURE_STORAGE_USE_EMULATOR", "AZURE_CREDENTIAL_TYPE")  # fmt: skip
    settings.has_credentials = _set(*named) or _is_on("7783-7084-3265-9085-8269-3286-77")  # the tag of all its machines
    return settings


# --- profiles of the AWS tools ---------------------------------------------------------------------------------------

_SIGNS_IN = {
    "sso_session",
    "sso_start_url",
    "role_arn",
    "credential_process",
    "web_identity_token_file",
    "login_session",
}
"""Settings of a profile that say how to get credentials, which boto3 can do."""


def _profile(url: str) -> dict[str, str]:
    """Return the settings of the profile in use: that of AWS_PROFILE, else `default`; empty where there is none.

    https://docs.aws.amazon.com/cli/latest/userguide/cli-configure-files.html
    """
    from configparser import Error, RawConfigParser

    wanted = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or ""
    name = wanted or "default"
    found: dict[str, str] = {}
    is_there = False
    for variable, path, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        file = os.environ.get(variable) or path
        parser = RawConfigParser(strict=False, default_section="\0")
        try:
            parser.read(Path(file).expanduser(), encoding="utf-8")
        except (Error, UnicodeDecodeError):
            raise NetworkError("the settings of the AWS tools cannot be understood", path=file) from None
        if parser.has_section(section):
            is_there = True
            found |= {key: value for key, value in parser.items(section) if value}
    if wanted and not is_there and not _set("AWS_ACCESS_KEY_ID"):
        raise NetworkError(f"there is no profile {wanted!r} in ~/.aws/config", path=url, hint="AWS_PROFILE names one")
    return found


def _signed_in(url: str) -> Callable[[], S3Credential]:
    """Return what gets the credentials of a profile that signs in; raises NetworkError where that cannot be done."""
    try:
        from boto3 import Session  # type: ignore[import-not-found]
    except ImportError:
        raise NetworkError(
            "the profile signs in by a role, a process or SSO, for which the package boto3 is needed",
            path=url,
            hint='pip install boto3, or: eval "$(aws configure export-credentials --format env)"',
        ) from None
    try:
        credentials = Session().get_credentials()
    except Exception:  # of botocore, with many classes
        credentials = None
    if credentials is None:
        raise NetworkError("the profile does not sign in", path=url, hint="aws sso login")

    def provide() -> S3Credential:
        now = credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key or "",
            "secret_access_key": now.secret_key or "",
            "token": now.token,
            "expires_at": datetime.now(timezone.utc) + timedelta(minutes=30),
        }

    return provide
