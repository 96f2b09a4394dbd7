"""Requests of obstore, tried again where that helps; their failures in our words, without anything secret.

What obstore says of a failure has addresses, headers and whole replies in it. It is only looked through for what
happened, and never shown.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ckpt_cli.errors import ChangedError, CkptError, NetworkError, UsageError, quoted
from ckpt_cli.remote.cloud_access import READ_SECONDS, WHO
from ckpt_cli.remote.store import Version

if TYPE_CHECKING:
    from obstore import ObjectMeta

T = TypeVar("T")

TRIES = 6
"""Times that a request is made."""

_PAUSES = (0.2, 0.4, 0.8, 1.6, 3.0)
"""Seconds before each further try."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of failures that may pass."""

BECAME_ANOTHER = "became another file while it was read; run it again"

UNSATISFIABLE = 416
"""The status of a range behind the end."""


class PassingError(Exception):
    """A failure that may not happen again."""

    def __init__(self, problem: str, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status


class NoCredentialsError(Exception):
    """Nobody gave credentials, though something said that there are any."""


class OtherRegionError(Exception):
    """The bucket is in another region than was asked."""


class ExistsError(Exception):
    """There is an object already where one was to be created."""


def tried(path: str, once: Callable[[], T], progress: Callable[[], int] = lambda: 0, tries: int = TRIES) -> T:
    """Return the result of `once`, called again after failures that may pass; raises NetworkError.

    `progress` counts what the calls achieved: after a call that achieved something, the count of tries begins again.
    """
    count, done = 0, progress()
    while True:
        try:
            return once()
        except PassingError as failed:  # noqa: PERF203 - it is about the network
            count = 1 if progress() > done else count + 1
            done = progress()
            if count >= tries:
                problem = f"{failed}, {count} times" if count > 1 else str(failed)
                raise NetworkError(problem, path=path, status=failed.status) from None
            time.sleep(_PAUSES[count - 1])


def asked(path: str, call: Callable[[], T], *, to_its_end: bool = False, is_list: bool = False) -> T:
    """Return the result of one call of obstore, with its errors as ours.

    An interrupt does not wait for its end, unless it is to be known `to_its_end` what it did. Of a list, obstore keeps
    the whole reply, however long it is: it is left once it has taken too much memory.

    Raises FileNotFoundError, ChangedError for an object of another version, PassingError, NetworkError, and the other
    errors of this module.
    """
    try:
        is_main = threading.current_thread() is threading.main_thread()
        beside = is_list or (is_main and not to_its_end)
        return _beside(call, path if is_list else None) if beside else call()
    except (CkptError, PassingError, TypeError):
        raise
    except Exception as error:
        raise _ours(error, path) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust: a reply that obstore did not think of
            raise
        raise NetworkError("its server gives an answer that cannot be understood", path=path) from None


_LIST_MEMORY, _LOOK_SECONDS = 256 << 20, 0.05
"""Bytes of memory that a page of a list may take, and the seconds between two looks at it."""


def _memory() -> int:
    """Return the bytes of memory that this process has; 0 where the system does not say, as only Linux does."""
    try:
        with open("/proc/self/statm", encoding="ascii") as facts:
            return int(facts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _beside(call: Callable[[], T], listed: str | None = None) -> T:
    """Run a call on a thread, as interrupts reach Python only and not obstore's code.

    Raises NetworkError where the call, which is for a list of a folder, takes too much memory.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    before = _memory()
    while not ended.wait(None if listed is None else _LOOK_SECONDS):
        if _memory() - before > _LIST_MEMORY:
            raise NetworkError("the list of its server does not end", path=listed)
    if errors:
        raise errors[0]
    return results[0]


def version_of(meta: ObjectMeta) -> Version:
    """Return the version that a reply or a list shows: lists have tags without quotes, and parts of seconds."""
    tag = (meta["e_tag"] or "").strip()
    if not tag.startswith("W/"):
        tag = tag.strip('"')
    changed = meta["last_modified"].replace(microsecond=0).isoformat()
    return Version(meta["size"], tag, changed)


_KINDS: tuple[tuple[str, str], ...] = (
    (r"certificate|invalid peer|unknownissuer|tls", "cannot be reached: its certificate is not valid"),
    (
        r"dns error|failed to lookup|name or service not known|no address associated",
        "cannot be reached: its name is not known",
    ),
    (r"too many redirects|redirect", "its server redirects more often than is followed"),
    (r"builder error|url scheme is not allowed|scheme is not", "its server redirects to what is not followed"),
)
"""Failures of connections that do not pass: an expression of what obstore says, and what we say."""

_PASSING_KINDS: tuple[tuple[str, str], ...] = (
    ("connection refused", "cannot be reached: Connection refused"),
    ("unreachable", "cannot be reached: Network is unreachable"),
    ("timed out|timedout", f"no answer in {READ_SECONDS} seconds"),
    ("connection reset|broken pipe|connectionreset", "the connection was reset"),
    ("incomplete|end of file|before message|unexpectedeof|connection closed|decoding response body|kind: body",
     "the connection ended too early"),
    ("error sending request|kind: request|kind: connect|hyper", "cannot be reached"),
)  # fmt: skip
"""Those that may pass."""

_NO_RANGES = "non-partial response"
_OTHER_RANGE = re.compile(r"requested \d+\.\.\d+, got \d+\.\.\d+|content-range header|parse value for content_range")


def _ours(error: Exception, path: str) -> Exception:
    """Return the error for one of obstore's."""
    name = type(error).__name__
    said = _without_addresses(str(error), path)
    hint = WHO.get(path.partition("://")[0], WHO["az"])
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if isinstance(error, ValueError):
        return UsageError("has a part that is empty, `.` or `..`, which obstore does not ask for", path=path)
    if name == "PreconditionError":
        return ChangedError(path, BECAME_ANOTHER)
    if name == "AlreadyExistsError":
        return ExistsError()
    if _ASKS_FOR_KEYS.search(str(error).partition("\n")[0].replace(path.partition("://")[2], "")):
        return NoCredentialsError()
    if name in ("PermissionDeniedError", "PermissionError", "UnauthenticatedError"):
        return _denied(401 if name == "UnauthenticatedError" else 403, path, hint)
    return _of_reply(said, path, hint) or _of_connection(said, path)


def _denied(status: int, path: str, hint: str) -> NetworkError:
    return NetworkError(f"access is denied ({status})", path=path, hint=hint, status=status)


_ASKS_FOR_KEYS = re.compile(
    "/latest/api/token|/latest/meta-data/|/computeMetadata/|/metadata/identity/|//169[.]254[.]|[Cc]redentials from"
)
"""Requests that obstore makes for credentials, and what it says where they fail."""


def _without_addresses(text: str, path: str) -> str:
    """Return what obstore says of a failure in lower case, without addresses and the names in them."""
    text = text.replace(path.partition("://")[2].partition("/")[2] or "\n", "")
    return re.sub(r"[a-z]+://[^\s\"]*|(host|path|query|domain): [^\n]*", "", text.lower())


def _of_reply(text: str, path: str, hint: str) -> Exception | None:
    """Return the error of a reply that is not what was asked for; None where there was no reply."""
    found, code = re.search(r"status code: (\d{3})", text), re.search("<code>([a-z]+)</code>", text)
    status, word = int(found[1]) if found else 0, code[1] if code else ""
    if word in ("authorizationheadermalformed", "permanentredirect") or "redirect without location" in text:
        return OtherRegionError()
    if word in ("expiredtoken", "tokenrefreshrequired"):
        return NetworkError("access is denied: the session has ended", path=path, hint=hint, status=status or None)
    if status in _PASSING:
        return PassingError(f"its server answers {status}", status)
    if status in (401, 403):
        return _denied(status, path, hint)
    if status == 404:  # a list of a bucket that is not there
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if status:
        return NetworkError(f"its server answers {status}", path=path, status=status)
    if _NO_RANGES in text:
        scheme = path.partition("://")[0]
        download = _DOWNLOADS.get(scheme, "az storage blob download")
        return NetworkError(
            "its server does not give parts of a file, only all of it",
            path=path,
            hint=f"download it first: {download} {quoted(path)} .",
        )
    if _OTHER_RANGE.search(text):
        return NetworkError("its server gives another part of the file than it is asked for", path=path)
    return None


_DOWNLOADS = {"s3": "aws s3 cp", "gs": "gcloud storage cp"}


def _of_connection(text: str, path: str) -> Exception:
    """Return the error of a connection that failed."""
    for expression, problem in _KINDS:
        if re.search(expression, text):
            return NetworkError(problem, path=path)
    for expression, problem in _PASSING_KINDS:
        if re.search(expression, text):
            return PassingError(problem)
    return NetworkError("its server gives an answer that cannot be understood", path=path)
