"""Files in object stores, read by ranges of one version: S3, Google Cloud Storage and Azure, through obstore.

Nothing of obstore is used but single requests: its file objects give fewer bytes than they are asked for. Ranges have
both ends, as Azure has none that count from the end.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_cli import limits
from ckpt_cli.errors import ChangedError, LimitError, NetworkError, UnsupportedError
from ckpt_cli.remote.cloud_access import WHO, Access, Bucket, access_to, region_of, require_obstore, split_url
from ckpt_cli.remote.cloud_requests import (
    BECAME_ANOTHER,
    TRIES,
    UNSATISFIABLE,
    NoCredentialsError,
    OtherRegionError,
    PassingError,
    asked,
    tried,
    version_of,
)
from ckpt_cli.remote.store import Listed, Upload, Version

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

T = TypeVar("T")

PART = 8 << 20
"""Bytes of one request at most."""

_PIECE = 64 << 10
"""Bytes that are taken from a reply at a time."""

_PAGE = 1000
"""Names in one reply to a request for a list, at most."""


def store(scheme: str) -> CloudStore:
    """Return a new store of the files of a scheme."""
    return CloudStore(scheme)


class CloudStore:
    """The files of all buckets of a scheme; any number of threads may use it."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self._accesses: dict[Bucket, Access] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Callable[[str], CloudStore], tuple[str]]:
        return _store_of_process, (self.scheme,)  # keys are taken from the environment there too

    def begin(self, path: str, nbytes: int) -> tuple[CloudObject, bytes]:
        """Return a file and its first `nbytes` bytes, by one request; one without bytes takes two.

        Raises FileNotFoundError where there is no such file, and NetworkError.
        """
        _, key = split_url(path)
        if not key:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        try:
            meta, data = self._first(path, key, max(nbytes, 1))
        except NetworkError as error:
            if error.status != UNSATISFIABLE:
                raise
            meta, data = self.meta_of(path), b""
            if meta["size"]:
                raise NetworkError("its server refuses to give its beginning", path=path) from None
        if meta["size"] > limits.REMOTE_BYTES:
            raise NetworkError(f"its server says that it has {meta['size']:,} bytes, which cannot be", path=path)
        return CloudObject(self, path, version_of(meta)), data[:nbytes]

    def _first(self, path: str, key: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        """Return the facts of an object and its first bytes."""
        require_obstore(path)
        import obstore

        def get(access: Access) -> tuple[ObjectMeta, bytes]:
            result = obstore.get(access.client, key, options={"range": (0, nbytes)})
            meta = result.meta
            buffer = bytearray(min(nbytes, meta["size"]))
            if _fill(result, memoryview(buffer)) < len(buffer):
                raise PassingError("the connection ended too early")
            return meta, bytes(buffer)

        return self.request(path, get)

    def object_at(self, path: str, version: Version) -> CloudObject:
        """Return a file of a version that a list gave, without a request."""
        return CloudObject(self, path, version)

    def meta_of(self, path: str) -> ObjectMeta:
        """Return the facts of an object by a request for its head; raises FileNotFoundError."""
        require_obstore(path)
        import obstore

        _, key = split_url(path)
        return self.request(path, lambda access: obstore.head(access.lister, key))

    # --- lists -------------------------------------------------------------------------------------------------------

    def entries_in(self, path: str, most: int | None = None) -> dict[str, Listed]:
        """Return the names in a folder, or some `most` of them; empty where there is no such folder.

        All that is below is listed, by pages of 1,000 names; a subfolder that fills one is left at once. So a list is
        never longer than what is kept of it. Raises LimitError beyond `limits.LISTED` names.
        """
        found: dict[str, Listed] = {}
        after: str | None = None
        while True:
            full = ""
            for page in self._pages(path, after):
                full = _fold(found, page)
                if most is not None and len(found) >= most:
                    return dict(list(found.items())[:most])
                if len(found) > limits.LISTED:
                    raise LimitError(f"the folder has more than {limits.LISTED:,} names", path=path)
                if full:
                    break
            skipped = f"{full}/\U0010ffff" if full else None
            if skipped is None:
                return found
            if after is not None and skipped <= after:
                raise NetworkError("its server lists the same names again", path=path)
            after = skipped

    def entries_below(self, path: str) -> Iterator[tuple[str, Version]]:
        """Yield the name below a folder and the version of every file in it and below it."""
        count = 0
        for page in self._pages(path, None):
            count += len(page)
            if count > limits.LISTED:
                raise LimitError(f"the folder has more than {limits.LISTED:,} files", path=path)
            yield from page

    def _pages(self, path: str, after: str | None) -> Iterator[list[tuple[str, Version]]]:
        """Yield lists of names below a folder, those after a name, with their versions."""
        require_obstore(path)
        import obstore

        _, key = split_url(path)
        prefix = f"{key}/" if key else ""

        last: str | None = f"{prefix}{after}" if after else None
        while True:
            stream: Any = None

            def begin(access: Access) -> list[ObjectMeta]:
                nonlocal stream
                stream = obstore.list(access.lister, key or None, offset=last, chunk_size=_PAGE)  # noqa: B023
                return next(stream, [])

            try:
                page = self.request(path, begin, is_list=True)
            except FileNotFoundError:  # there is no such bucket
                return
            try:
                while page:
                    last = page[-1]["path"]
                    yield [
                        (meta["path"][len(prefix) :], version_of(meta))
                        for meta in page
                        if meta["path"].startswith(prefix) and len(meta["path"]) > len(prefix)
                    ]
                    page = asked(path, lambda: next(stream, []), is_list=True)  # noqa: B023
            except PassingError:
                continue  # goes on after the last name that came
            return

    # --- uploads -----------------------------------------------------------------------------------------------------

    def upload(self, path: str, *, replace: bool, nbytes: int = 0) -> AbstractContextManager[Upload]:
        """Return a context manager of an upload of `nbytes` bytes, which is aborted where the block raises."""
        from ckpt_cli.remote.cloud_upload import upload

        return upload(self, path, replace=replace, nbytes=nbytes)

    def remove(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""
        require_obstore(path)
        import obstore

        _, key = split_url(path)
        try:
            self.request(path, lambda access: obstore.delete(access.lister, key))
        except FileNotFoundError:
            return

    # --- requests ----------------------------------------------------------------------------------------------------

    def request(
        self,
        path: str,
        call: Callable[[Access], T],
        *,
        progress: Callable[[], int] = lambda: 0,
        tries: int = TRIES,
        to_its_end: bool = False,
        is_list: bool = False,
    ) -> T:
        """Return what a call of obstore gives for a path, tried again as often as helps.

        Where nobody gives credentials it is asked once without any, and where a bucket is in another region, there.
        """
        bucket, _ = split_url(path)

        def once() -> T:
            access = self._access(bucket, path)
            return asked(path, lambda: call(access), to_its_end=to_its_end, is_list=is_list)

        for _ in range(3):
            try:
                return tried(path, once, progress, tries)
            except (NoCredentialsError, OtherRegionError) as error:  # noqa: PERF203 - it is about the network
                self._connect(bucket, path, error)
            except NetworkError as error:
                raise self._explained(error, bucket) from None
        raise NetworkError("there are no credentials", path=path, hint=WHO[bucket.scheme])

    def _explained(self, error: NetworkError, bucket: Bucket) -> NetworkError:
        """Return an error with the reason why access is denied, where it is that nobody said who asks."""
        access = self._accesses.get(bucket)
        if error.status in (401, 403) and access is not None and access.is_anonymous:
            problem = f"access is denied ({error.status}), and there are no credentials"
            return NetworkError(problem, path=error.path, hint=error.hint, status=error.status)
        return error

    def _access(self, bucket: Bucket, path: str) -> Access:
        if os.getpid() != self._process:
            raise UnsupportedError(
                "object stores cannot be read in a forked process",
                path=path,
                hint="a pool with multiprocessing.get_context('spawn') can",
            )
        with self._lock:
            if bucket not in self._accesses:
                self._accesses[bucket] = access_to(bucket, path)
            return self._accesses[bucket]

    def _connect(self, bucket: Bucket, path: str, failed: Exception) -> None:
        """Connect to a bucket in another way than the one that failed: without credentials, or in another region."""
        with self._lock:
            access = self._accesses[bucket]
            if isinstance(failed, OtherRegionError):
                region = region_of(bucket)
                if region in ("", access.region):
                    raise NetworkError("its bucket is in another region", path=path, hint="AWS_REGION names a region")
                self._accesses[bucket] = access_to(bucket, path, anonymous=access.is_anonymous, region=region)
            elif access.is_anonymous:
                raise NetworkError("there are no credentials", path=path, hint=WHO[bucket.scheme])
            else:
                self._accesses[bucket] = access_to(bucket, path, anonymous=True, region=access.region)


@cache
def _store_of_process(scheme: str) -> CloudStore:
    """Return the store of what was sent to this process."""
    return CloudStore(scheme)


class CloudObject:
    """One version of one object."""

    revision = ""

    def __init__(self, store: CloudStore, path: str, version: Version) -> None:
        self._store = store
        self.path = path
        """Its URL."""
        self.version = version
        """The version that is read."""
        self._key = split_url(path)[1]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`; raises ChangedError where the object is of another version."""
        for begin in range(0, len(buffer), PART):
            self._read_part(buffer[begin : begin + PART], offset + begin)

    def _read_part(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer by one request, or by several where faults make it more; each goes on where one broke off."""
        require_obstore(self.path)
        import obstore

        done = 0
        tag = self.version.tag
        match: GetOptions = {"if_match": f'"{tag}"'} if tag and not tag.startswith("W/") else {}

        def get(access: Access) -> None:
            nonlocal done
            wanted = (offset + done, offset + len(buffer))
            result = obstore.get(access.client, self._key, options={"range": wanted, **match})
            if not is_same(version_of(result.meta), self.version):
                raise ChangedError(self.path, BECAME_ANOTHER)
            came = 0
            try:
                for came in _filling(result, buffer[done:]):  # noqa: B007 - how far it came is also for failures
                    pass
            finally:
                done += came
            if done < len(buffer):
                raise PassingError("the connection ended too early")

        try:
            self._store.request(self.path, get, progress=lambda: done)
        except FileNotFoundError:
            raise ChangedError(self.path, BECAME_ANOTHER) from None
        except NetworkError as error:
            if error.status == UNSATISFIABLE:
                raise ChangedError(self.path, BECAME_ANOTHER) from None
            raise

    def __reduce__(self) -> tuple[Callable[..., CloudObject], tuple[object, ...]]:
        return CloudObject, (self._store, self.path, self.version)


def _fill(result: Any, buffer: memoryview) -> int:
    """Fill a buffer from a reply; returns the bytes that came."""
    came = 0
    for came in _filling(result, buffer):  # noqa: B007
        pass
    return came


def _filling(result: Any, buffer: memoryview) -> Iterator[int]:
    """Fill a buffer from a reply, and yield how many bytes came so far; what is more than fits is not read."""
    done = 0
    if not len(buffer):
        return
    for piece in result.stream(min_chunk_size=_PIECE):
        kept = min(len(piece), len(buffer) - done)
        buffer[done : done + kept] = piece if kept == len(piece) else memoryview(piece)[:kept]
        done += kept
        yield done
        if done == len(buffer):
            return


def is_same(one: Version, other: Version) -> bool:
    """True if two versions are the same, as far as they show: by their tags, else by the times of their changes."""
    if one.size != other.size:
        return False
    return one.tag == other.tag if one.tag and other.tag else one.changed == other.changed


def _fold(found: dict[str, Listed], page: list[tuple[str, Version]]) -> str:
    """Add the names of a page to those in a folder; returns the subfolder that all of the page lies in, or nothing."""
    folders = set()
    for name, version in page:
        first, slash, _ = name.partition("/")
        folders.add(first if slash else "")
        if slash:
            known = found.get(first)
            if known is None or known.version is None or not known.version.size:  # else it is also a file, which counts
                found[first] = Listed(True)
        elif first not in found:
            found[first] = Listed(False, version)
    return folders.pop() if len(folders) == 1 and len(page) >= _PAGE // 2 else ""
