"""One server of each kind on loopback, as the same few questions: a folder is put there, and requests are counted.

`https` is plain http here: TLS changes nothing of what is asked. The hub and its CDN count as one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import localbucket
import pytest
from buckets import buckets_in
from fake_hub import Answer, Asked, FakeHub, counted_server, ranged, serving


@dataclass(frozen=True)
class Server:
    """A server that the environment leads to."""

    kind: str
    """`https`, `hf` or `s3`."""
    put: Callable[[Path, str], str]
    """Puts the files below a folder there under a name, in the place of what was there, and returns their address."""
    requests: Callable[[], int]
    """The number of requests since `forget`."""
    nbytes: Callable[[], int]
    """Bytes of the bodies of all replies since then."""
    forget: Callable[[], None]


@contextmanager
def _https() -> Iterator[Server]:
    folders: dict[str, Path] = {}
    counts = FakeHub()

    def answer(asked: Asked, _: bytes) -> Answer:
        name, _, rest = unquote(asked.path).lstrip("/").partition("/")
        path = folders.get(name, Path("/nowhere")) / rest
        if not path.is_file():
            return 404, {}, b""
        info = path.stat()
        return ranged(path, f'"{info.st_mtime_ns:x}-{info.st_size:x}"', asked.range, {})

    with counted_server(counts, "web", answer) as url:

        def put(folder: Path, name: str) -> str:
            folders[name] = folder
            return f"{url}/{name}/"

        yield Server("https", put, *_counts(counts))


@contextmanager
def _hf() -> Iterator[Server]:
    with serving() as hub, pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", hub.url)
        patched.setenv("HF_HOME", "/nowhere")

        def put(folder: Path, name: str) -> str:
            hub.commit(f"lab/{name}", folder)
            return f"hf://lab/{name}/"

        yield Server("hf", put, *_counts(hub))


@contextmanager
def _s3() -> Iterator[Server]:
    with TemporaryDirectory() as root, buckets_in(Path(root)) as buckets, pytest.MonkeyPatch.context() as patched:
        for name, value in buckets.environment().items():
            patched.setenv(name, value)
        patched.setattr(localbucket, "object_etag", _tag)  # the digest of a gigabyte takes a while

        def put(folder: Path, name: str) -> str:
            within = buckets.bucket() / name
            shutil.rmtree(within, ignore_errors=True)
            shutil.copytree(folder, within, copy_function=_linked)
            return f"s3://bucket/{name}/"

        yield Server("s3", put, lambda: len(buckets.asked), lambda: buckets.nbytes, buckets.begin)


def _tag(path: Path) -> str:
    """The tag of an object, by its state."""
    info = path.stat()
    return md5(f"{path} {info.st_mtime_ns} {info.st_size}".encode()).hexdigest()


def _linked(source: str, target: str) -> None:
    """Copy a small file, and give a large one another name."""
    if Path(source).stat().st_size < 1 << 20:
        shutil.copy(source, target)
    else:
        Path(target).hardlink_to(source)


def without_revision(text: str) -> str:
    """What info says without the commit of the hub, which the same checkpoint on the disk does not have."""
    return re.sub(r'(?:\| )?revision[\s|,]+[0-9a-f]{40}[ |]*\n|,\s*"revision": "[0-9a-f]{40}"', "", text)


def _counts(hub: FakeHub) -> tuple[Callable[[], int], Callable[[], int], Callable[[], None]]:
    return lambda: len(hub.log), lambda: sum(each.nbytes for each in hub.log), hub.forget


SERVERS: Mapping[str, Callable[[], AbstractContextManager[Server]]] = {"https": _https, "hf": _hf, "s3": _s3}
"""By the scheme that the documentation calls them by."""
