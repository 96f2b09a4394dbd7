"""A hub on loopback, and the CDN that it redirects to, with a count of all requests.

It answers as huggingface.co does, as far as `huggingface_hub` and `ckpt` ask: large files lie on a CDN at another port,
under signed addresses that expire, and small ones on the hub itself, one redirect away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".distcp", ".npz", ".pkl")
"""The suffixes of files that are large ones (LFS), whatever they weigh."""
TOKEN = "hf_good"
"""The token of a user that has access to private repositories, and to gated ones that are in `open_to`."""

Files = Mapping[str, bytes | Path]
Answer = tuple[int, dict[str, str], "bytes | Path"]


@dataclass(frozen=True)
class Asked:
    """One request, and what it cost."""

    server: str
    """`hub` or `cdn`."""
    method: str
    path: str
    """As it was sent, without its query."""
    query: str
    range: str | None
    authorization: str | None
    status: int = 0
    nbytes: int = 0
    """Bytes of the body of the reply."""


@dataclass
class Repository:
    """Commits of files, and the branches, tags and other references that lead to them."""

    commits: dict[str, dict[str, bytes | Path]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        """The commit that a revision leads to."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class FakeHub:
    """The state of both servers; tests change it while they run."""

    page: int = 1000
    """Entries of one page of a list."""
    latency: float = 0.0
    """Seconds before each reply."""
    names_commit_in_lists: bool = True
    """Whether a list of a folder says by X-Repo-Commit which commit it is of."""
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    open_to: set[str] = field(default_factory=set)
    """Gated repositories that the owner of the token was given access to."""
    interrupt: Callable[[Asked], Answer | None] = lambda _: None
    """Answers a request in the place of the servers; None lets them answer."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[Asked] = field(default_factory=list)
    url: str = ""
    cdn: str = ""
    signature: int = 1
    """The one that addresses of the CDN must have."""
    in_flight: int = 0
    most_in_flight: int = 0
    blobs: dict[str, bytes | Path] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def commit(self, repository: str, files: Files | Path, ref: str = "main") -> str:
        """Put files, or those below a folder, on a branch in the place of what it had; return the commit."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path for path in files.rglob("*") if path.is_file()}
        repo = self.repositories.setdefault(repository, Repository())
        sha = sha1(f"{repository} {ref} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = dict(files)
        repo.refs[ref] = sha
        return sha

    def expire(self) -> None:
        """Have the CDN refuse every address that was given out so far."""
        self.signature += 1

    def forget(self) -> None:
        """Forget the requests so far."""
        self.log.clear()
        self.most_in_flight = 0

    def asked(self, server: str = "", text: str = "") -> list[Asked]:
        """The requests to one of the servers, or to both, whose path has a text."""
        return [each for each in self.log if server in each.server and text in each.path]

    # --- the hub -------------------------------------------------------------------------------------------------

    def answer(self, asked: Asked, body: bytes) -> Answer:
        """Answer a request to the hub."""
        parts = [unquote(part) for part in asked.path.strip("/").split("/")]
        cached = parts[:2] == ["api", "resolve-cache"]
        in_api = parts[0] == "api"
        parts = parts[2 if cached else 1 :] if in_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets", "spaces") else "models"
        name = "/".join(parts[:2]) if kind == "models" else f"{kind}/{'/'.join(parts[:2])}"
        if (refusal := self._refusal(name, asked, "resolve" in parts[2:3] or cached)) is not None:
            return refusal
        action, rest = ("resolve", parts[2:]) if cached else (next(iter(parts[2:]), "revision"), parts[3:])
        sha = self.repositories[name].commit_of(rest[0] if rest else "main")
        if sha is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
        path = "/".join(rest[1:])
        if action == "tree":
            return self._tree(name, sha, path, asked)
        if action == "paths-info":
            return self._paths(name, sha, body)
        if action == "revision":
            return self._facts(name, sha)
        return self._resolve(kind, name, sha, path, asked, cached=cached)

    def _refusal(self, name: str, asked: Asked, of_content: bool) -> Answer | None:
        """Refuse who may not ask: for a private repository a token is needed, for the content of a gated one access."""
        given = (asked.authorization or "").removeprefix("Bearer ")
        if given not in ("", TOKEN):
            return _error(401, "", "Invalid credentials in Authorization header")
        if name not in self.repositories or (name in self.private and not given):
            return _error(404 if given else 401, "RepoNotFound", "Repository not found")
        if of_content and name in self.gated and not (given and name in self.open_to):
            return _error(403 if given else 401, "GatedRepo", f"Access to model {name} is restricted.")
        return None

    def _tree(self, name: str, sha: str, folder: str, asked: Asked) -> Answer:
        query = {key: values[0] for key, values in parse_qs(asked.query).items()}
        recursive = query.get("recursive", "").lower() in ("1", "true")
        entries = self._entries(name, sha, folder, recursive)
        if folder and not entries:
            return _error(404, "EntryNotFound", f"{folder} does not exist on this revision")
        at = int(query.get("cursor", "0"))
        headers = {"Content-Type": "application/json"}
        if self.names_commit_in_lists:
            headers["X-Repo-Commit"] = sha
        if at + self.page < len(entries):
            following = urlencode({**query, "cursor": str(at + self.page)})
            headers["Link"] = f'<{self.url}{asked.path}?{following}>; rel="next"'
        return 200, headers, json.dumps(entries[at : at + self.page]).encode()

    def _entries(self, name: str, sha: str, folder: str, recursive: bool) -> list[dict[str, object]]:
        start = f"{folder}/" if folder else ""
        found: dict[str, dict[str, object]] = {}
        for path, content in self.repositories[name].commits[sha].items():
            if not path.startswith(start):
                continue
            parts = path[len(start) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                within = start + "/".join(parts[:depth])
                found[within] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": within}
            if recursive or len(parts) == 1:
                found[path] = self._entry(path, content)
        return [found[path] for path in sorted(found)]

    def _entry(self, path: str, content: bytes | Path) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "oid": oid(content), "size": size_of(content), "path": path}
        if is_large(path, content):
            digest = self._blob(content)
            entry["lfs"] = {"oid": digest, "size": size_of(content), "pointerSize": 134}
            entry["xetHash"] = digest[::-1]
        return entry

    def _paths(self, name: str, sha: str, body: bytes) -> Answer:
        wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        files = self.repositories[name].commits[sha]
        found = [self._entry(path, files[path]) for path in wanted if path in files]
        return 200, {"Content-Type": "application/json", "X-Repo-Commit": sha}, json.dumps(found).encode()

    def _facts(self, name: str, sha: str) -> Answer:
        names = [{"rfilename": path} for path in sorted(self.repositories[name].commits[sha])]
        facts = {"id": name, "sha": sha, "private": name in self.private, "tags": [], "siblings": names}
        return 200, {"Content-Type": "application/json", "X-Repo-Commit": sha}, json.dumps(facts).encode()

    def _resolve(self, kind: str, name: str, sha: str, path: str, asked: Asked, *, cached: bool) -> Answer:
        headers = {"X-Repo-Commit": sha}
        content = self.repositories[name].commits[sha].get(path)
        if content is None:
            return _error(404, "EntryNotFound", "Entry not found", headers)
        if is_large(path, content):
            digest = self._blob(content)
            headers |= {
                "X-Linked-Size": str(size_of(content)),
                "X-Linked-ETag": f'"{digest}"',
                "Accept-Ranges": "bytes",
            }
            where = f"{self.cdn}/{quote(name)}/{digest}?Expires={int(time.time()) + 3600}&Signature={self.signature}"
            return 302, headers | {"Location": where}, b"Found. Redirecting"
        headers |= {"X-Linked-ETag": f'"{oid(content)}"'}
        if not cached:
            plain = name.split("/", 1)[1] if kind != "models" else name
            return 307, headers | {"Location": f"/api/resolve-cache/{kind}/{plain}/{sha}/{quote(path)}"}, b""
        return ranged(content, f'"{oid(content)}"', asked.range, headers)

    # --- the CDN -------------------------------------------------------------------------------------------------

    def answer_cdn(self, asked: Asked, body: bytes) -> Answer:
        """Answer a request to the CDN, which knows no users, only signatures."""
        query = parse_qs(asked.query)
        if asked.authorization is not None:
            return 400, {}, b"Only one auth mechanism allowed"  # as S3 says
        if query.get("Signature") != [str(self.signature)]:
            return 403, {}, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
        digest = asked.path.rpartition("/")[2]
        return ranged(self.blobs[digest], f'"{digest[:32]}"', asked.range, {})

    def _blob(self, content: bytes | Path) -> str:
        """The digest by which the CDN knows a file; that of a long one is of its place and state."""
        if isinstance(content, Path) and size_of(content) > 1 << 24:
            digest = sha256(f"{content} {content.stat().st_mtime_ns}".encode()).hexdigest()
        else:
            digest = sha256(bytes_of(content)).hexdigest()
        self.blobs[digest] = content
        return digest


def _error(status: int, code: str, message: str, headers: Mapping[str, str] = {}) -> Answer:
    named = {"X-Error-Code": code} if code else {}
    return status, {**headers, **named, "X-Error-Message": message}, json.dumps({"error": message}).encode()


def ranged(content: bytes | Path, etag: str, wanted: str | None, headers: Mapping[str, str]) -> Answer:
    """Answer with a file, or the range of it that is asked for."""
    size = size_of(content)
    headers = {**headers, "ETag": etag, "Accept-Ranges": "bytes"}
    if wanted is None:
        return 200, headers, bytes_of(content)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    if not first:
        return 400, headers, b"suffix ranges are not known here"
    begin, end = int(first), min(int(last or size - 1), size - 1) + 1
    if begin >= size:
        return 416, headers | {"Content-Range": f"bytes */{size}"}, b""
    if isinstance(content, Path):
        with content.open("rb") as file:
            file.seek(begin)
            part = file.read(end - begin)
    else:
        part = content[begin:end]
    return 206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}, part


def is_large(path: str, content: bytes | Path) -> bool:
    """True for a file that lies on the CDN."""
    return path.endswith(WEIGHTS) or size_of(content) > 10_000_000


def size_of(content: bytes | Path) -> int:
    """Bytes of a file."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def bytes_of(content: bytes | Path) -> bytes:
    """All of a file."""
    return content.read_bytes() if isinstance(content, Path) else content


def oid(content: bytes | Path) -> str:
    """The name that git gives a file's content."""
    data = f"{content} {size_of(content)}".encode() if size_of(content) > 1 << 24 else bytes_of(content)
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet: clients go away in the middle of replies."""


def _handler(hub: FakeHub, server: str, answer: Callable[[Asked, bytes], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 30

        def log_message(self, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts, given = urlsplit(self.path), self.headers
            asked = Asked(server, self.command, parts.path, parts.query, given["Range"], given["Authorization"])
            with hub.lock:
                hub.in_flight += 1
                hub.most_in_flight = max(hub.most_in_flight, hub.in_flight)
            try:
                time.sleep(hub.latency)
                status, headers, content = hub.interrupt(asked) or answer(asked, body)
            finally:
                with hub.lock:
                    hub.in_flight -= 1
            sent = b"" if self.command == "HEAD" else bytes_of(content)
            with hub.lock:
                hub.log.append(Asked(**{**vars(asked), "status": status, "nbytes": len(sent)}))
            self.send_response(status)
            for name, value in {"Content-Length": str(size_of(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    return Handler


@contextmanager
def counted_server(hub: FakeHub, server: str, answer: Callable[[Asked, bytes], Answer]) -> Iterator[str]:
    """Context manager: a server whose requests are counted with those of a hub; gives its address."""
    with _Server(("127.0.0.1", 0), _handler(hub, server, answer)) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Context manager: a hub without repositories, and its CDN, on loopback."""
    hub = FakeHub()
    with counted_server(hub, "hub", hub.answer) as hub.url, counted_server(hub, "cdn", hub.answer_cdn) as hub.cdn:
        yield hub
