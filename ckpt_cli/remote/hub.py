"""The Hugging Face hub: `hf://OWNER/REPO[@REVISION][/PATH]`, each revision at one commit for a whole command.

A folder is listed at `/api/models/OWNER/REPO/tree/REVISION/PATH`. A file is at `/OWNER/REPO/resolve/REVISION/PATH`,
which redirects to a CDN for large files, and to another address of the hub for small ones. Replies say by
`X-Repo-Commit` which commit a revision is (https://huggingface.co/docs/hub/api, and the library huggingface_hub).
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ckpt_cli import limits
from ckpt_cli.errors import ChangedError, LimitError, NetworkError, UnsupportedError, UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.remote.client import Client, Reply
from ckpt_cli.remote.http import BECAME_ANOTHER, HttpObject, Target, begin, version_of
from ckpt_cli.remote.hub_user import endpoint, headers_of_user, require_online
from ckpt_cli.remote.store import Listed, Upload, Version
from ckpt_cli.remote.url import shown

_LIST_BYTES = 32 << 20
"""Bytes of one page of a list; the hub's pages have 1,000 entries of some 300 bytes."""

_PAGES = 1_000
"""Pages of one list."""

_COMMIT = re.compile("[0-9a-f]{40}")

_KINDS = ("models", "datasets", "spaces")

_OTHER_KINDS = ("buckets", "kernels", "model", "dataset", "space")
"""Words that the hub has in the place of an owner, and that no repository is read by."""

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)

_REVISION_OF_PARTS = re.compile(r"refs/(?:pr/[0-9]+|convert/[\w.-]+)(?=/|$)")
"""Revisions that are written with their slashes; in all others a slash is `%2F`."""

_NOT_THERE = "there is no such repository, revision or folder, or it is not yours to read"

_HINT = "a token says who you are: HF_TOKEN=... or hf auth login"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """What an address names: a file or folder in a repository at a revision."""

    kind: str
    """`models`, `datasets` or `spaces`."""
    repository: str
    """`OWNER/REPO`."""
    revision: str
    """A branch, a tag, a commit or another reference such as `refs/pr/1`."""
    name: str
    """The path within the repository; empty for all of it."""

    @staticmethod
    def of(address: str) -> Place:
        """Return what an address names; raises UsageError where it names no repository."""
        kind, rest = "models", address.partition("://")[2].strip("/")
        if (first := rest.partition("/")[0]) in _KINDS:
            kind, rest = first, rest.partition("/")[2]
        owner, _, rest = rest.partition("/")
        named, slash, name = rest.partition("/")
        repository, mark, revision = named.partition("@")
        if mark:
            whole = revision + slash + name
            found = _REVISION_OF_PARTS.match(whole)
            revision = found[0] if found else revision
            name = whole[len(revision) :].removeprefix("/")
        if owner in _OTHER_KINDS or not _REPOSITORY.fullmatch(f"{owner}/{repository}") or (mark and not revision):
            raise UsageError(
                "this is not the address of a repository of the hub",
                path=address,
                hint="hf://OWNER/REPO[@REVISION][/PATH], or hf://datasets/OWNER/REPO...",
            )
        return Place(kind, f"{owner}/{repository}", unquote(revision) if mark else "main", name)

    def tree(self, commit: str) -> str:
        """Return the address at which the hub lists the folder."""
        within = f"/{quote(self.name)}" if self.name else ""
        return f"{endpoint()}/api/{self.kind}/{self.repository}/tree/{quote(commit, safe='')}{within}"

    def file(self, commit: str) -> str:
        """Return the address at which the hub gives the file, or redirects to it."""
        kind = "" if self.kind == "models" else f"{self.kind}/"
        return f"{endpoint()}/{kind}{self.repository}/resolve/{quote(commit, safe='')}/{quote(self.name)}"

    def facts(self) -> str:
        """Return the address at which the hub says what a revision is."""
        return f"{endpoint()}/api/{self.kind}/{self.repository}/revision/{quote(self.revision, safe='')}"


def store(scheme: str) -> HubStore:  # noqa: ARG001 - it has one
    """Return the store of files on the hub."""
    return HubStore()


class HubStore:
    """Files of repositories on the hub: of each revision those of the commit that the first reply about it says."""

    def __init__(self) -> None:
        self._client = Client()
        self._commits: dict[tuple[str, str, str], str] = {}
        """By kind, repository and revision."""
        self._pinning = threading.RLock()

    def begin(self, path: str, nbytes: int) -> tuple[HubObject, bytes]:
        """Return a file and its first `nbytes` bytes, by one request to the hub and one to where it redirects to."""
        require_online(path)
        place = Place.of(path)
        if not place.name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

        def ask(commit: str) -> tuple[tuple[HttpObject, bytes, Reply], Mapping[str, str]]:
            with _explained(path):
                found = begin(self._client, _target(path, place, commit), nbytes)
            return found, _of_hub(found[2])

        (found, data, reply), commit = self._at_commit(path, place, ask)
        version = Version(found.version.size, _blob(reply))
        return HubObject(self._client, _target(path, place, commit), version, found.where), data

    def object_at(self, path: str, version: Version) -> HubObject:
        """Return a file of a version that a list gave."""
        place = Place.of(path)
        return HubObject(self._client, _target(path, place, self._commit(path, place)), version)

    def entries_in(self, path: str, most: int | None = None) -> dict[str, Listed]:
        """Return the names in a folder, or some `most` of them; none where there is no such folder."""
        found = self._entries(path, recursive=False)
        return dict(found if most is None else islice(found, most))

    def entries_below(self, path: str) -> Iterator[tuple[str, Version]]:
        """Yield the name below a folder and the version of every file in it and below it."""
        for name, listed in self._entries(path, recursive=True):
            if listed.version is not None:
                yield name, listed.version

    def upload(self, path: str, *, replace: bool, nbytes: int = 0) -> AbstractContextManager[Upload]:  # noqa: ARG002
        """Raise UnsupportedError: the hub is written to by its own program."""
        raise self._unwritten(path)

    def remove(self, path: str) -> None:
        """Raise UnsupportedError: the hub is written to by its own program."""
        raise self._unwritten(path)

    def _unwritten(self, path: str) -> UnsupportedError:
        repository = Place.of(path).repository
        return UnsupportedError(
            "ckpt does not write to hf://", path=path, hint=f"write it here, then: hf upload {repository} OUT"
        )

    # --- commits -------------------------------------------------------------------------------------------------

    def _known(self, place: Place) -> str | None:
        """Return the commit that a revision is, as far as it is known."""
        if _COMMIT.fullmatch(place.revision):
            return place.revision
        return self._commits.get((place.kind, place.repository, place.revision))

    def _at_commit(self, path: str, place: Place, ask: Callable[[str], tuple[T, Mapping[str, str]]]) -> tuple[T, str]:
        """Return what the hub says of a place, asked for at one commit, and that commit.

        `ask` makes the request, and also returns the headers of the hub's reply. The first one is for the revision,
        and the commit that it says is the one of all others: they wait for it. Raises ChangedError where a reply is of
        another commit.
        """
        with nullcontext() if self._known(place) else self._pinning:
            known = self._known(place)
            result, headers = ask(known or place.revision)
            said = headers.get("X-Repo-Commit", "")
            if known is None and _COMMIT.fullmatch(said):
                known = self._commits[place.kind, place.repository, place.revision] = said
            if known is None:
                return ask(known := self._commit(path, place))[0], known
            if said not in ("", known):
                raise ChangedError(path, BECAME_ANOTHER)
            return result, known

    def _commit(self, path: str, place: Place) -> str:
        """Return the commit that a revision is; the hub is asked where no reply has said it."""
        with self._pinning:
            known = self._known(place)
            if known is None:
                reply = self._get(path, place.facts())
                said = _parsed(path, reply, dict).get("sha")
                if not isinstance(said, str) or not _COMMIT.fullmatch(said):
                    raise NetworkError("its server does not say which commit it is", path=path)
                known = self._commits[place.kind, place.repository, place.revision] = said
            return known

    # --- lists ---------------------------------------------------------------------------------------------------

    def _entries(self, path: str, *, recursive: bool) -> Iterator[tuple[str, Listed]]:
        """Yield the names in or below a folder, a page of the hub's list after another."""
        require_online(path)
        place = Place.of(path)
        start = f"{place.name}/" if place.name else ""
        query: str | None = "recursive=true" if recursive else ""
        count = pages = 0
        while query is not None:
            page, query = self._page(path, place, query)
            count += len(page)
            pages += 1
            if count > limits.LISTED:
                raise LimitError(f"its server lists more than {limits.LISTED:,} names", path=path)
            if pages > _PAGES or (query is not None and not page):
                raise NetworkError("the list of its server does not end", path=path)
            for entry in page:
                name, listed = _listed(entry, start)
                if listed is not None and (recursive or "/" not in name):
                    yield name, listed

    def _page(self, path: str, place: Place, query: str) -> tuple[list[Any], str | None]:
        """Return a page of the list of a folder, and the query of the next one; None after the last."""

        def ask(commit: str) -> tuple[Reply, Mapping[str, str]]:
            reply = self._get(path, place.tree(commit) + (f"?{query}" if query else ""))
            return reply, reply.headers

        reply, _ = self._at_commit(path, place, ask)
        return ([], None) if reply.status != 200 else (_parsed(path, reply, list), _next_query(reply))

    def _get(self, path: str, address: str) -> Reply:
        """Ask the hub; raises NetworkError where there is no such repository or revision, or none for this user."""
        with _explained(path):
            reply = self._client.get(address, path=path, headers=headers_of_user(path), most=_LIST_BYTES, hint=_HINT)
        if reply.status != 200 and reply.headers.get("X-Error-Code") != "EntryNotFound":
            raise NetworkError(_NOT_THERE, path=path, hint=_HINT, status=reply.status)
        return reply


class HubObject(HttpObject):
    """One file of one commit, read by ranges from where the hub redirects to.

    Its version has the name that the hub gives its content. The CDN has other tags of its own.
    """

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`; raises ChangedError where the file is of another version."""
        with _explained(self.path):
            super().read_into(buffer, offset)

    def _first_version(self) -> Version:
        return Version(self.version.size)

    def _version_of(self, reply: Reply) -> Version:
        return version_of(reply, self.version.size)

    def _require_range(self, reply: Reply, version: Version, offset: int, end: int) -> None:
        """Raise the error of a reply that is of another file, or not the range that was asked for."""
        blob = _blob(reply) if _of_hub(reply) else ""
        if "" not in (blob, self.version.tag) and blob != self.version.tag:
            raise ChangedError(self.path, BECAME_ANOTHER)
        super()._require_range(reply, version, offset, end)

    def __reduce__(self) -> tuple[Callable[..., HubObject], tuple[object, ...]]:
        return _reopened, (self._client, self._target.address, self.path, self.version, self.where)


def _reopened(
    client: Client, address: str, path: str, version: Version, where: tuple[str, Version] | None
) -> HubObject:
    """Return a file that was sent to this process; the token is that of its own environment."""
    return HubObject(client, Target(address, path, tuple(headers_of_user(path).items()), _HINT), version, where)


def _target(path: str, place: Place, commit: str) -> Target:
    """Return what is asked for to read a file at a commit."""
    return Target(place.file(commit), path, tuple(headers_of_user(path).items()), _HINT, commit)


def _of_hub(reply: Reply) -> Mapping[str, str]:
    """Return the headers by which the hub says what it redirects to; none where it was not asked."""
    return next((headers for headers in (*reply.hops, reply.headers) if "X-Repo-Commit" in headers), {})


def _blob(reply: Reply) -> str:
    """Return the name that the hub gives the content of a file, as its lists do; empty where it says none."""
    linked = (headers["X-Linked-ETag"] for headers in (*reply.hops, reply.headers) if "X-Linked-ETag" in headers)
    tag = next(linked, "" if reply.hops else reply.headers.get("ETag", ""))
    return tag.strip().removeprefix("W/").strip('"')


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Context manager: say what a refusal means on the hub, which answers 401 also for what is not there."""
    try:
        yield
    except NetworkError as error:
        if error.code == "GatedRepo":
            place = Place.of(path)
            kind = "" if place.kind == "models" else f"{place.kind}/"
            error.problem = "it is gated, and you were not given access to it"
            error.hint = f"ask for access at {shown(endpoint())}/{kind}{place.repository}; {_HINT}"
        elif error.status == 401:
            error.problem = _NOT_THERE
        elif error.status == 429:
            error.hint = f"the hub lets those do more that it knows: {_HINT}"
        raise


def _parsed(path: str, reply: Reply, kind: type[T]) -> T:
    """Return the JSON of a reply; raises NetworkError where it is something else."""
    try:
        found = json.loads(reply.body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise NetworkError("its server sends something else than the hub does", path=path)
    return found


def _listed(entry: Any, start: str) -> tuple[str, Listed | None]:
    """Return the name of an entry of a list below a folder, and what it is; None for what is not a file or folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return "", None
    path, size = entry["path"], entry.get("size")
    name = path.removeprefix(start)
    if len(name) + len(start) != len(path) or not _is_plain(name):
        return "", None
    if entry.get("type") == "directory":
        return name, Listed(is_folder=True)
    large = entry.get("lfs")
    blob = large.get("oid") if isinstance(large, dict) else entry.get("oid")
    if entry.get("type") != "file" or type(size) is not int or not 0 <= size <= limits.REMOTE_BYTES:
        return name, None
    return name, Listed(False, Version(size, blob if isinstance(blob, str) else ""))


def _is_plain(name: str) -> bool:
    """True for a name below a folder that leads nowhere else."""
    return bool(name) and "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))


def _next_query(reply: Reply) -> str | None:
    """Return the query by which the next page of a list is asked for, of the same server; None after the last."""
    found = re.search(r'<([^<>]*)>\s*;[^,<]*\brel="?next\b', reply.headers.get("Link", ""))
    return urlsplit(found[1]).query if found else None
