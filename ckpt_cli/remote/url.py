"""Addresses of files elsewhere: their schemes, and paths that show nothing secret in place of them.

What a user gives is an address: a URL, perhaps with a user, a password and a query, all of which may be secrets. The
rest of ckpt knows only its path: the URL without user and password, with `?…` in place of a query. Paths stand in
messages, answers and JSON. `Addresses` makes paths of addresses, and the other way round.
"""

from __future__ import annotations

import errno
import importlib
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from ckpt_cli.remote.store import Store

SCHEMES = {
    "http": "http",
    "https": "http",
    "hf": "hub",
    "s3": "cloud",
    "gs": "cloud",
    "az": "cloud",
    "abfs": "cloud",
    "abfss": "cloud",
}
"""The schemes, each with the module of this room whose `store` makes its `Store`."""

_CUT = "?…"
"""It stands in a path for the query of its address."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
"""A scheme has two letters or more: one is a drive of Windows."""

_QUERIED = ("http", "https")
"""The schemes whose addresses have users, passwords, queries and quoted characters."""


def scheme_of(path: str) -> str | None:
    """Return the scheme of a path in lower case; None for a path of the disk."""
    found = _SCHEME.match(path)
    return found[1].lower() if found else None


def store_for(scheme: str) -> Store:
    """Return a new store of a scheme; raises FileNotFoundError for a scheme that nothing is read from."""
    if scheme not in SCHEMES:
        others = ", ".join(SCHEMES)
        raise FileNotFoundError(errno.ENOENT, f"nothing is read from such a URL, only from {others}", f"{scheme}://…")
    made: Store = importlib.import_module(f"ckpt_cli.remote.{SCHEMES[scheme]}").store(scheme)
    return made


def shown(address: str) -> str:
    """Return the path of an address for messages: without user and password, `?…` for a query."""
    return _parts(address)[0]


def user_of(address: str) -> tuple[str, str] | None:
    """Return the user and the password in an address, unquoted; None where it has none."""
    user = _parts(address)[1]
    if not user:
        return None
    name, _, password = user.partition(":")
    return unquote(name), unquote(password)


def without_user(address: str) -> str:
    """Return an address without user and password, to be asked for."""
    path, user, _ = _parts(address)
    return address.replace(f"{user}@", "", 1).partition("#")[0] if user or path.startswith("http") else address


def origin_of(address: str) -> str:
    """Return the scheme, host and port of an address: what a user and a password are meant for."""
    scheme, _, rest = without_user(address).partition("://")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0].lower()
    default = {"http": ":80", "https": ":443"}.get(scheme.lower(), "")
    return f"{scheme.lower()}://{host.removesuffix(default) if default else host}"


def _parts(address: str) -> tuple[str, str, str]:
    """Return the path, the user and the query of an address; the last two are empty where it has none."""
    scheme, _, rest = address.partition("://")
    if scheme.lower() not in _QUERIED:
        return address, "", ""
    rest = rest.partition("#")[0]
    rest, mark, query = rest.partition("?")
    host, slash, name = rest.partition("/")
    user, _, host = host.rpartition("@")
    return f"{scheme.lower()}://{host}{slash}{name}{_CUT if mark and query else ''}", user, query


class Addresses:
    """The addresses that a user gave, by the paths that show nothing secret of them."""

    def __init__(self, known: Addresses | None = None) -> None:
        """Begin with those of another, where a command runs again."""
        self._queries: dict[str, str] = dict(known._queries) if known else {}
        """Queries by path, and by folder for the files beside."""
        self._users: dict[str, str] = dict(known._users) if known else {}
        """Users and passwords by origin, as they are in a URL."""

    def admitted(self, address: str) -> str:
        """Return the path of an address, and remember what is secret in it; a path stays as it is.

        Of two addresses that differ only in their queries the second has `?…2`, so that each has a path of its own.
        """
        if _CUT in address:
            return address
        path, user, query = _parts(address)
        if user:
            self._users[origin_of(address)] = user
        if query:
            bare, number = path, 1
            while self._queries.get(path, query) != query:
                number += 1
                path = f"{bare}{number}"
            self._queries[path] = query
            self._queries[folder_of(path)] = query
        return path

    def address(self, path: str) -> str:
        """Return the address of a path, with all that is needed to be let in.

        A file beside one whose address had a query gets the same query, as one signature may be for a whole folder.
        """
        if path.partition("://")[0] not in _QUERIED:
            return path
        bare = path.partition(_CUT)[0]
        query = self._queries.get(path) or self._queries.get(folder_of(path))
        user = self._users.get(origin_of(bare))
        if user:
            bare = bare.replace("://", f"://{user}@", 1)
        return f"{bare}?{query}" if query else bare


def folder_of(path: str) -> str:
    """Return the folder of a path without a slash at its end; a path that ends with one is a folder itself."""
    return path.partition(_CUT)[0].rpartition("/")[0]


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder; over http, characters that mean something else in a URL are quoted."""
    scheme, separator, rest = folder.partition(_CUT)[0].partition("://")
    folder = f"{scheme}{separator}{rest.rstrip('/')}"
    if scheme in _QUERIED:
        name = re.sub("[%?#]", lambda found: f"%{ord(found[0]):02X}", name)
    return f"{folder}/{name}"


def name_of(path: str) -> str:
    """Return the last part of a path as a file's name."""
    name = path.partition(_CUT)[0].rstrip("/").rpartition("/")[2]
    return unquote(name) if path.partition("://")[0] in _QUERIED else name
