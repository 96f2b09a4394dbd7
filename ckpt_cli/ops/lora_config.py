"""The settings of a LoRA adapter: PEFT's `adapter_config.json`, or what diffusers writes into the file itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import closing
from math import isfinite
from typing import Any

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, UnsupportedError, about, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.files.interrupts import limited_work
from ckpt_cli.files.places import exists, folder_of, join, open_file
from ckpt_cli.model.checkpoint import Checkpoint

ADAPTER_CONFIG = "adapter_config.json"

_NOT_MERGED = {
    "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained tokens", "alora_invocation_tokens": "activated LoRA",
    "kasa_config": "KaSA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "arrow_config": "Arrow",
    "target_parameters": "LoRA of single parameters", "lora_mlp_config": "another kind of LoRA",
    "megatron_config": "parallel layers of Megatron", "use_exora": "another kind of LoRA",
}  # fmt: skip
"""Settings, by what they stand for, with which the weights are not the sum of the model's and a product."""

_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Ways to begin a training that change the model's own weights, to which the adapter belongs from then on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an adapter's config says of the product of its factors."""

    alpha: float | None = None
    """None where there is no config."""
    patterns: Patterns | None = None
    """Other alphas, for the modules whose names a pattern fits."""
    rslora: bool = False
    """True if alpha is divided by the square root of the rank."""
    fan_in_fan_out: bool = False
    """True if the model's weights are in × out."""
    use_dora: bool = False

    def alpha_of(self, module: str) -> float | None:
        """Return the alpha of a module; None where nothing says it."""
        other = self.patterns.find(module) if self.patterns is not None else None
        return self.alpha if other is None else other


def settings_of(checkpoint: Checkpoint) -> tuple[Settings, Mapping[str, Any]]:
    """Return the settings of an adapter, and the whole config that they are from: empty where there is none.

    Raises MalformedError for a config that cannot be read, UnsupportedError for one of another kind of adapter.
    """
    config = read_config(checkpoint)
    if config is None:
        return _of_metadata(checkpoint), {}
    with about(join(folder_of(checkpoint.container.files[0].path), ADAPTER_CONFIG)):
        return _settings(config), config


def read_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the `adapter_config.json` beside an adapter; None where there is none."""
    path = join(folder_of(checkpoint.container.files[0].path), ADAPTER_CONFIG)
    if not exists(path):
        return None
    with about(path), closing(open_file(path)) as file:
        if file.size > limits.ADAPTER_JSON:
            raise LimitError(f"it has {file.size:,} bytes, far more than a config of an adapter")
        try:
            config = json.loads(file.read(0, file.size))
        except (ValueError, RecursionError):
            raise MalformedError("it is not JSON") from None
        if not isinstance(config, dict):
            raise MalformedError("it is not a config")
        return config


def _settings(config: Mapping[str, Any]) -> Settings:
    """Return the settings that a config of PEFT states."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(f"the adapter is of the kind {_short(kind)}, not LORA")
    others = [f"{key} ({what})" for key, what in _NOT_MERGED.items() if config.get(key)]
    if others:
        raise UnsupportedError(f"it says {listed(others, 3)}, which is not merged")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INITS):
        raise UnsupportedError(
            f"init_lora_weights is {_short(init)}: the adapter belongs to weights that PEFT changed before training",
            hint="save it with path_initial_model_for_weight_conversion, which makes a plain adapter of it",
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise MalformedError("alpha_pattern does not have an alpha for each pattern")
    found = {pattern: _number(alpha, "alpha_pattern") for pattern, alpha in patterns.items()}
    alpha = config.get("lora_alpha")
    return Settings(
        alpha=8.0 if alpha is None else _number(alpha, "lora_alpha"),
        patterns=Patterns(found),
        rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        use_dora=bool(config.get("use_dora")),
    )


def _of_metadata(checkpoint: Checkpoint) -> Settings:
    """Return the settings that diffusers notes in the metadata of a safetensors file, if it does."""
    text = checkpoint.metadata.get("lora_adapter_metadata", "")
    if not text or len(text) > limits.ADAPTER_JSON:
        return Settings()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return Settings()
    found: dict[str, float] = {}
    rslora = False
    for key, value in config.items() if isinstance(config, dict) else ():
        part, _, name = key.rpartition(".")
        if name == "lora_alpha" and isinstance(value, int | float) and isfinite(value):
            found[rf"{part}\..*" if part else ".*"] = float(value)
        if name == "use_rslora":
            rslora = rslora or bool(value)
        if name == "alpha_pattern" and value:
            raise UnsupportedError("its metadata has an alpha_pattern, which is not read")
    return Settings(patterns=Patterns(found), rslora=rslora)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise MalformedError(f"{name} has {_short(value)}, which is not a number")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


# --- patterns ---------------------------------------------------------------------------------------------------------

_LITERAL = re.compile(r"(?:[^\\^$.|?*+()\[\]{}]|\\?\.)*")
"""A pattern that stands for itself: PEFT writes names without escaping their dots."""

_REPEATED_GROUP = re.compile(r"\)\s*[*+?{]")

_REPEATS = 3
"""Parts of a pattern that may be repeated."""

_LONGEST = 1_000
"""Characters of a pattern that is more than a name."""

_SEARCHED = 100
"""Patterns that are more than names."""

_DEEPEST = 64
"""Parts of a module's name, counted from its end, that a pattern may fit."""


class Patterns:
    """Numbers for the modules whose names fit patterns: the first pattern that fits counts, as in PEFT.

    A pattern fits a whole name, or the end of one after a dot. Raises UnsupportedError for patterns whose search could
    take for ever, MalformedError for what is not a pattern.
    """

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self._names: dict[str, tuple[int, float]] = {}
        self._anchored: dict[str, tuple[int, float]] = {}
        self._searched: list[tuple[int, str, float]] = []
        for number, (pattern, value) in enumerate(numbers.items()):
            inner = pattern.removesuffix("$")
            if not _LITERAL.fullmatch(inner.removeprefix("^")):
                _require_quick(pattern)
                self._searched.append((number, pattern, value))
            elif inner.startswith("^"):
                self._anchored.setdefault(inner[1:].replace("\\.", "."), (number, value))
            else:
                self._names.setdefault(inner.replace("\\.", "."), (number, value))
        if len(self._searched) > _SEARCHED:
            raise UnsupportedError(f"{len(self._searched):,} patterns are more than names, {_SEARCHED} at most can be")

    def find(self, module: str) -> float | None:
        """Return the number for a module; None where no pattern fits."""
        found = [self._anchored[module]] if module in self._anchored else []
        rest = module
        for _ in range(_DEEPEST):
            if rest in self._names:
                found.append(self._names[rest])
            _, dot, rest = rest.partition(".")
            if not dot:
                break
        best = min(found, default=None)
        for number, pattern, value in self._searched:
            if best is not None and best[0] < number:
                break
            with limited_work(limits.MATCH_SECONDS, lambda pattern=pattern: _too_slow(pattern)):  # type: ignore[misc]
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
        return None if best is None else best[1]


def _require_quick(pattern: str) -> None:
    """Raise UnsupportedError for a pattern whose search could take for ever."""
    repeats = sum(map(pattern.count, "*+?{"))
    is_slow = repeats > _REPEATS or _REPEATED_GROUP.search(pattern) or re.search(r"\\[1-9]|\(\?", pattern)
    if is_slow or len(pattern) > _LONGEST:
        raise UnsupportedError(f"the pattern {_short(pattern)} could take for ever to search for")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise MalformedError(f"{_short(pattern)} is not a pattern") from None


def _too_slow(pattern: str) -> UnsupportedError:
    return UnsupportedError(f"the pattern {_short(pattern)} takes too long to search for")
