"""The environment of the hub's own programs, as far as it says where the hub is, and who the user is.

It is that of huggingface_hub (https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables).
"""

from __future__ import annotations

import os
from contextlib import suppress

from ckpt_cli.errors import NetworkError, UsageError

_TRUE = ("1", "ON", "YES", "TRUE")

_TOKEN_BYTES = 16 << 10
"""Bytes of the file of a token that are read."""


def endpoint() -> str:
    """Return the address of the hub, without a slash at its end; raises UsageError where HF_ENDPOINT is none."""
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not address.lower().startswith(("https://", "http://")):
        raise UsageError("HF_ENDPOINT is not the address of a hub", hint="HF_ENDPOINT=https://huggingface.co")
    return address


def require_online(path: str) -> None:
    """Raise NetworkError where the environment says that the hub is not to be asked."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in _TRUE:
            raise NetworkError(f"{name} is set, so the hub is not asked", path=path, hint=f"unset {name}")


def headers_of_user(path: str) -> dict[str, str]:
    """Return the header with the token of the user, if there is one; raises NetworkError where it cannot be one."""
    token = _token()
    if not token:
        return {}
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise NetworkError(
            "the token of HF_TOKEN, or that of hf auth login, has characters that no token has", path=path
        )
    return {"Authorization": f"Bearer {token}"}


def _token() -> str:
    """Return the token of the environment, or the one that `hf auth login` left; empty where there is none."""
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _TRUE:
        return ""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if not token.strip():
        with suppress(OSError), open(_token_path(), encoding="utf-8", errors="replace") as file:
            token = file.read(_TOKEN_BYTES)
    return token.strip()


def _token_path() -> str:
    """Return the path of the file of `hf auth login`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return os.path.expandvars(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")))
