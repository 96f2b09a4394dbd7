"""Pairs of a state_dict and a model, made by a seed: the state_dict has other names, parts or shapes than the model."""

from __future__ import annotations

import random
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]


class Attention(nn.Module):
    def __init__(self, width: int, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Transformer(nn.Module):
    """Blocks, with an embedding that may be tied to the head, and a buffer that is not saved."""

    def __init__(self, width: int, depth: int, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.register_buffer("rope", torch.zeros(depth), persistent=False)
        if tied:
            self.head.weight = self.embed.weight


class ConvNet(nn.Module):
    """Convolutions with batch norms, as torchvision names them."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        for number in range(1, depth + 1):
            block = [nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
            self.add_module(f"layer{number}", nn.Sequential(*block))
        self.fc = nn.Linear(width, 5)


class Vocoder(nn.Module):
    """Convolutions with weight norm, in the spelling of before torch 2.0 or since."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.ups = nn.ModuleList(norm(nn.Conv1d(width, width + n, 3)) for n in range(depth))
        self.post = norm(nn.Conv1d(width, 1, 3))


class OldVocoder(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch says that it is deprecated
            warnings.simplefilter("ignore")
            self.ups = nn.ModuleList(nn.utils.weight_norm(nn.Conv1d(width, width + n, 3)) for n in range(depth))


class Counted(nn.Module):
    """A layer with extra state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.steps = {"n": 3}

    def get_extra_state(self) -> Any:
        return self.steps

    def set_extra_state(self, state: Any) -> None:
        self.steps = state


class WithExtra(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Counted(width)
        self.outer = nn.Sequential(Counted(width), nn.Linear(width, 3))


class Lazy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.rest = nn.LazyLinear(width)


def model_of(rng: random.Random) -> nn.Module:
    """Return one of the models."""
    width, depth = rng.choice([2, 3, 4, 6]), rng.randrange(2, 6)
    makers: list[Callable[[], nn.Module]] = [
        lambda: Transformer(width, depth, tied=rng.random() < 0.5),
        lambda: Transformer(width, depth, tied=False),
        lambda: ConvNet(width, depth),
        lambda: Vocoder(width, depth),
        lambda: OldVocoder(width, depth),
        lambda: WithExtra(width),
        lambda: Lazy(width),
        lambda: nn.Sequential(*(nn.Linear(width + n, width + n + 1) for n in range(depth))),
    ]
    return rng.choice(makers)()


Rename = Callable[[str], str]


def by(pattern: str, replacement: str) -> Rename:
    return lambda name: re.sub(pattern, replacement, name)


def _shifted(name: str) -> str:
    return re.sub(r"^layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + 1}.", name)


RENAMES: dict[str, Rename] = {
    "nothing": lambda name: name,
    "module": by("^", "module."),
    "compiled": by("^", "_orig_mod."),
    "model": by("^", "model."),
    "two wrappers": by("^", "module._orig_mod."),
    "longer prefix": by("^", "backbone.encoder."),
    "checkpointed": by(r"^(layers|ups)\.(\d+)\.", r"\1.\2._checkpoint_wrapped_module."),
    "compiled blocks": by(r"^(layers|ups)\.(\d+)\.", r"\1.\2._orig_mod."),
    "layers as h": by(r"^(layers|layer|ups)(\d|\.)", r"transformer.h\2"),
    "renamed head": by(r"^(head|fc|post)\.", "classifier."),
    "attention": by(r"\battn\.", "self_attention."),
    "wq": by(r"\b([qkvo])_proj\.", r"w\1."),
    "query": lambda name: by(r"\bv_proj\.", "value.")(by(r"\bk_proj\.", "key.")(by(r"\bq_proj\.", "query.")(name))),
    "old weight norm": lambda name: by(r"parametrizations\.weight\.original1$", "weight_v")(
        by(r"parametrizations\.weight\.original0$", "weight_g")(name)
    ),
    "new weight norm": lambda name: by(r"\bweight_v$", "parametrizations.weight.original1")(
        by(r"\bweight_g$", "parametrizations.weight.original0")(name)
    ),
    "counted from one": _shifted,
    "gamma": lambda name: by(r"(norm\d?)\.bias$", r"\1.beta")(by(r"(norm\d?)\.weight$", r"\1.gamma")(name)),
    "many words": lambda name: by(r"\bnorm(\d)\.", r"ln_\1.")(
        by(r"\bmlp\.", "ffn.")(by(r"^layers\.", "blocks.")(name))
    ),
}
"""From the names of the model to those of the checkpoint."""


@dataclass
class Pair:
    """A state_dict, the model that it is loaded into, and what was done to it."""

    state: State
    model: nn.Module
    did: list[str] = field(default_factory=list)
    truth: dict[str, str] = field(default_factory=dict)
    """The names of the state_dict that changed, and what the model calls them."""


def pair(seed: int) -> Pair:
    """Return the pair of a seed."""
    rng = random.Random(seed)
    torch.default_generator.manual_seed(seed)
    model = model_of(rng)
    state: State = OrderedDict(model.state_dict())
    notes = dict(getattr(model.state_dict(), "_metadata", {}))
    made = Pair(state, model)
    _change(made, rng)
    for _ in range(rng.choice([1, 1, 1, 2])):
        names = [n for n, rename in RENAMES.items() if any(rename(old) != old for old in made.state)]
        name = rng.choice(["nothing", *names])
        rename = RENAMES[name]
        back = {rename(old): made.truth.get(old, old) for old in made.state}
        if len(back) == len(made.state):
            made.state = OrderedDict((rename(old), value) for old, value in made.state.items())
            made.truth = back
            notes = {rename(f"{module}.").removesuffix(".") if module else "": v for module, v in notes.items()}
            made.did.append(name)
    made.truth = {old: new for old, new in made.truth.items() if old != new}
    if rng.random() < 0.7:
        made.state._metadata = OrderedDict(notes)  # type: ignore[attr-defined]
    else:
        made.did.append("no metadata")
    return made


def _change(made: Pair, rng: random.Random) -> None:
    """Change the tensors themselves, by chance."""
    change = rng.choice([*CHANGES, None, None])
    if change is not None:
        change(made.state, rng)
        made.did.append(change.__name__)


def changed_head(state: State, rng: random.Random) -> None:
    last = next(name for name in reversed(state) if is_full(state[name]))
    state[last] = torch.zeros(7, *state[last].shape)


def dropped(state: State, rng: random.Random) -> None:
    for name in rng.sample(list(state), min(2, len(state))):
        del state[name]


def added(state: State, rng: random.Random) -> None:
    state["ema_decay"] = torch.zeros(())


def without_counters(state: State, rng: random.Random) -> None:
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]


def an_extra_state_less(state: State, rng: random.Random) -> None:
    for name in [name for name in state if name.endswith("_extra_state")][:1]:
        del state[name]


def an_extra_state_more(state: State, rng: random.Random) -> None:
    state["head._extra_state"] = {"a": torch.zeros(1)}


def halves(state: State, rng: random.Random) -> None:
    for name, value in state.items():
        if is_full(value) and value.is_floating_point():
            state[name] = value.half()


def is_full(value: object) -> bool:
    """True for a tensor that has a shape."""
    return isinstance(value, Tensor) and not nn.parameter.is_lazy(value)


CHANGES: tuple[Callable[[State, random.Random], None], ...] = (
    changed_head, dropped, added, without_counters, an_extra_state_less, an_extra_state_more, halves,
)  # fmt: skip


_LIST = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: (.*?)\. (?=\n|$)")
_SIZE = re.compile(r"size mismatch for (\S+): copying a param")


@dataclass
class Loaded:
    """What load_state_dict says."""

    loads: bool
    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    sizes: set[str] = field(default_factory=set)


def load(model: nn.Module, state: State) -> Loaded:
    """Return what torch itself says of a strict load."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        said = {kind: set(re.findall(r'"([^"]+)"', names)) for kind, names in _LIST.findall(str(error))}
        return Loaded(False, said.get("Missing", set()), said.get("Unexpected", set()), set(_SIZE.findall(str(error))))
    return Loaded(True)
