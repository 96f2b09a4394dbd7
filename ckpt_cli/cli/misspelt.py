"""A first argument that is no command: a file, or a word for what some command does."""

from __future__ import annotations

from collections.abc import Collection

from ckpt_cli.cli.options import may_be_file
from ckpt_cli.errors import UsageError

_WORDS = {
    "ls": "list dir ll names keys contents entries",
    "info": "summary summarize describe about inspect overview",
    "tree": "modules layers structure architecture model",
    "show": "cat print view head get values dump display peek",
    "ties": "tied aliases shared sharing",
    "stats": "stat statistics mean std minmax histogram",
    "diff": "compare cmp difference changes",
    "check": "verify validate lint fsck test doctor",
    "hash": "checksum digest sum sha256 md5 fingerprint sha256sum",
    "scan": "audit security safe malware virus picklescan",
    "set": "edit assign write update modify patch put change",
    "rename": "mv move prefix strip",
    "rm": "prune delete remove del drop erase discard",
    "keep": "select filter extract only pick subset",
    "cast": "half dtype bf16 bfloat16 fp16 float16 fp32 float32 quantize precision astype",
    "to": "device cpu cuda gpu map_location",
    "tie": "link share join",
    "untie": "unlink clone unshare",
    "meta": "metadata header",
    "compact": "shrink trim vacuum gc repack squeeze optimize",
    "convert": "export save cp copy shard split reshard consolidate safetensors to_safetensors",
    "index": "reindex",
    "undo": "revert restore rollback",
}
"""For each command, words that mean the same to some."""


def require_file(word: str, commands: Collection[str]) -> None:
    """Return if a word that is no command may be a file, and raise UsageError otherwise, with the command it means."""
    if may_be_file(word):
        return
    import difflib

    meant = next((name for name, words in _WORDS.items() if word.lower() in words.split()), None)
    close = [meant] if meant is not None else difflib.get_close_matches(word, commands)
    problem = f"No such command {word!r}." + (f" Did you mean {', '.join(map(repr, close))}?" if close else "")
    raise UsageError(problem, hint=f"ckpt {close[0]} --help" if close else "ckpt --help")
