"""Checks of a checkpoint against the `config.json` or `adapter_config.json` that Hugging Face's libraries put beside.

Only contradictions are reported, never names that the tables do not know or a config that says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckpt_cli.errors import listed
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.ties import claim_against, embedding_and_head

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Configured:
    """A checkpoint with what is said of it beside it."""

    where: str
    tensors: Sequence[Tensor]
    config: Config
    """The `config.json`, or of a model of several parts what it says of the text; empty where there is no config."""
    adapter: Config
    """The `adapter_config.json`."""
    complete: bool
    """True if all of the model is there: one shard of a set or a broken set is not."""


def text_config(config: Config) -> Config:
    """The part of a config that speaks of the text model."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


# --- dimensions -------------------------------------------------------------------------------------------------------

_TOP = r"(?:model\.|transformer\.|gpt_neox\.|bert\.|roberta\.|language_model\.|base_model\.)*"
_LAYER = _TOP + r"(?:encoder\.layer|layers|h)\.\d+\."


def _integer_at(config: Config, *keys: str) -> int | None:
    """The first of these that the config gives as a positive number."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _width(config: Config) -> int | None:
    return _integer_at(config, "hidden_size", "n_embd", "d_model")


def _embedding_width(config: Config) -> int | None:
    return _integer_at(config, "embedding_size", "word_embed_proj_dim") or _width(config)


def _heads(*keys: str) -> Callable[[Config], int | None]:
    """Return a function for the rows of a projection onto the number of heads that `keys` name."""

    def rows(config: Config) -> int | None:
        if "kv_lora_rank" in config or config.get("attn_output_gate"):  # projections of another kind
            return None
        width, all_heads = _width(config), _integer_at(config, "num_attention_heads", "n_head")
        size = _integer_at(config, "head_dim")
        if size is None and width and all_heads and width % all_heads == 0:
            size = width // all_heads
        heads = _integer_at(config, *keys)
        return heads * size if heads and size else None

    return rows


@dataclass(frozen=True, slots=True)
class Dimension:
    """The value that a config has for one dimension of the tensors of a name."""

    keys: str
    """Its keys in the config."""
    name: str
    """The pattern of the whole name of such a tensor."""
    dim: int
    expected: Callable[[Config], int | None]
    plain: bool = False
    """True if quantized models have it too, whose other weights are packed."""


def _dimension(
    keys: str, name: str, dim: int, expected: Callable[[Config], int | None] | None = None, *, plain: bool = False
) -> Dimension:
    return Dimension(keys, name, dim, expected or (lambda config: _integer_at(config, keys)), plain)


DIMENSIONS = (
    _dimension("vocab_size", _TOP + r"(?:embed_tokens|wte|embed_in|embeddings\.word_embeddings)\.weight", 0,
               plain=True),
    _dimension("vocab_size", r"(?:language_model\.)?(?:lm_head|embed_out)\.weight", 0),
    _dimension("hidden_size", _TOP + r"(?:embed_tokens|wte|embed_in)\.weight", 1, _embedding_width, plain=True),
    _dimension("hidden_size", r"(?:language_model\.)?(?:lm_head|embed_out)\.weight", 1, _embedding_width),
    _dimension("hidden_size", _LAYER + r"(?:input_layernorm|post_attention_layernorm|ln_1|ln_2)\.weight", 0, _width),
    _dimension("hidden_size", _LAYER + r"(?:self_attn\.[qkv]_proj|mlp\.(?:gate|up)_proj)\.weight", 1, _width),
    _dimension("intermediate_size", _LAYER + r"mlp\.(?:gate|up)_proj\.weight", 0),
    _dimension("intermediate_size", _LAYER + r"mlp\.down_proj\.weight", 1),
    _dimension("num_attention_heads", _LAYER + r"self_attn\.q_proj\.weight", 0, _heads("num_attention_heads")),
    _dimension("num_key_value_heads", _LAYER + r"self_attn\.[kv]_proj\.weight", 0,
               _heads("num_key_value_heads", "num_attention_heads")),
)  # fmt: skip


def _dimensions(subject: Configured) -> Iterator[Occurrence]:
    packed = "quantization_config" in subject.config
    wanted = [
        (rule, re.compile(rule.name).fullmatch, expected)
        for rule in DIMENSIONS
        if (rule.plain or not packed) and (expected := rule.expected(subject.config)) is not None
    ]
    for tensor in subject.tensors if wanted else ():
        for rule, matches, expected in wanted:
            shape = tensor.shape
            if shape is None or len(shape) <= rule.dim or not matches(tensor.name):
                continue
            if shape[rule.dim] != expected:
                yield Occurrence(
                    f"{subject.where}: {tensor.name}",
                    f"by {rule.keys} of config.json its dimension {rule.dim} should be {expected}, "
                    f"its shape is {list(shape)}",
                )


_NUMBERED = _TOP + r"(?:encoder\.layer|layers|h)\.(\d{1,6})\..*"


def _layers(subject: Configured) -> Iterator[Occurrence]:
    said = _integer_at(subject.config, "num_hidden_layers", "n_layer")
    found = {int(match[1]) for tensor in subject.tensors if (match := re.fullmatch(_NUMBERED, tensor.name))}
    if said is None or not found or not subject.complete or subject.adapter:
        return
    extra = _integer_at(subject.config, "num_nextn_predict_layers") or 0
    lacking = sorted(set(range(min(said, 100_000))) - found)
    if lacking:
        yield Occurrence(subject.where, f"config.json says {said} layers, of which {listed(lacking, 3)} are not there")
    if max(found) >= said + extra:
        yield Occurrence(subject.where, f"config.json says {said} layers, there is a layer {max(found)}")


# --- ties, dtypes, adapters -------------------------------------------------------------------------------------------


def _tied(subject: Configured) -> Iterator[Occurrence]:
    if subject.config.get("tie_word_embeddings") is not True:
        return
    claim = claim_against(subject.tensors)
    if claim is not None:
        yield Occurrence(subject.where, claim)


def _no_head(subject: Configured) -> Iterator[Occurrence]:
    """A language model whose config ties nothing, but which has no head."""
    kinds = subject.config.get("architectures")
    if subject.config.get("tie_word_embeddings") is not False or not isinstance(kinds, list) or not subject.complete:
        return
    embedding, head = embedding_and_head(subject.tensors)
    if (
        embedding is not None
        and head is None
        and any(isinstance(kind, str) and kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    ):
        yield Occurrence(
            subject.where,
            f"config.json does not tie the embeddings, but there is no lm_head beside {embedding.name}: it would be "
            "random",
        )


def _dtype(subject: Configured) -> Iterator[Occurrence]:
    said = subject.config.get("torch_dtype") or subject.config.get("dtype")
    floats = {tensor.dtype.name for tensor in subject.tensors if tensor.dtype.category == "float"}
    known = {"float64", "float32", "float16", "bfloat16"}
    if "quantization_config" in subject.config or not isinstance(said, str) or not floats or not floats <= known:
        return
    said = said.removeprefix("torch.")
    if said in known and said not in floats:
        yield Occurrence(subject.where, f"config.json says {said}, its tensors are {' and '.join(sorted(floats))}")


_LORA = (
    (r".*\.lora_A(?:\.[^.]+)?\.weight", 0),
    (r".*\.lora_B(?:\.[^.]+)?\.weight", 1),
)


def _rank(subject: Configured) -> Iterator[Occurrence]:
    rank = _integer_at(subject.adapter, "r")
    if rank is None or subject.adapter.get("rank_pattern"):
        return
    for tensor in subject.tensors:
        for name, dim in _LORA:
            shape = tensor.shape or ()
            if dim < len(shape) and shape[dim] != rank and re.fullmatch(name, tensor.name):
                yield Occurrence(
                    f"{subject.where}: {tensor.name}",
                    f"adapter_config.json says r = {rank}, its shape is {list(shape)}",
                )


CHECKS: tuple[Check[Configured], ...] = (
    Check("config-shape", "error", "a shape contradicts the vocabulary, widths or heads that `config.json` says",
          _dimensions, "correct config.json, or fetch both from one place"),
    Check("config-layers", "error", "there are fewer or more layers than `config.json` says", _layers,
          "ckpt ls --fold FILE"),
    Check("no-head", "error", "`config.json` ties no embeddings, but there is no `lm_head`", _no_head,
          "set tie_word_embeddings to true if they were tied"),
    Check("untied", "warning", "`config.json` says that the embeddings are tied, but they are stored apart", _tied,
          "ckpt ties --equal FILE shows whether they are equal"),
    Check("config-dtype", "warning", "no tensor has the dtype that `config.json` says", _dtype, "correct config.json"),
    Check("adapter-rank", "error", "LoRA shapes contradict `r` of `adapter_config.json`", _rank,
          "correct adapter_config.json"),
)  # fmt: skip
