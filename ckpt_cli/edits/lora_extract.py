"""The engine of `lora extract`: what a training changed of a model, as a LoRA adapter of PEFT."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from ckpt_cli.budget import Budget
from ckpt_cli.edits.convert_contents import Casting, pack_plain
from ckpt_cli.edits.lora_resize import Resized, ranks_and_alphas, require_finite, values_of
from ckpt_cli.edits.lora_targets import are_equal
from ckpt_cli.edits.lora_write import AdapterOptions, Made, write_adapter
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError, about, some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.nn.infer import guess
from ckpt_cli.ops.lora import FLOATS
from ckpt_cli.ops.match_states import model_tensors
from ckpt_cli.ops.quantization import groups_text, quantized_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckpt_cli.arrays.factors import Factored

_PREFIX = "base_model.model."
_LINEAR, _TRANSPOSED, _EMBEDDING, _CONVS = "Linear", "Conv1D", "Embedding", ("Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True, slots=True)
class LoraExtract:
    """The result of an extraction, or of its dry run."""

    base: str
    tuned: str
    output: str
    rank: int
    svd: str
    seed: int
    modules: Sequence[Resized]
    whole: Sequence[str]
    """Tensors that the adapter has as they are, because they are not matrices, or are of other shapes."""
    residual: float
    """The part of the norm of all differences of matrices that the adapter lacks."""
    bytes_written: int
    dry_run: bool


def extract(
    base: str, tuned: str, output: str, rank: int, options: AdapterOptions, *, svd: str = "randomized", seed: int = 0
) -> LoraExtract:
    """Write the difference of two models as an adapter for PEFT, in a new folder, all or nothing.

    Matrices that differ become factors of a rank of at most `rank`; other tensors that differ are taken as they are.
    Raises RefusedError where names differ, or nothing else does.
    """
    if rank < 1:
        raise UsageError("the rank is a number from 1 on")
    with about(base), closing(open_checkpoint(base)) as first, about(tuned), closing(open_checkpoint(tuned)) as second:
        pairs = _pairs(first, second)
        work = _Work(first, second, rank, svd, seed)
        made = work.made(pairs, options)
        mode_of = second.container.files[0].path
        new = NewCheckpoint(made.tensors, made.contents, metadata={"format": "pt"}, mode_of=mode_of)
        nbytes = write_adapter(output, new, work.config(first.path), options, lambda: None, tuned)
    residual = sqrt(work.left / work.total) if work.total else 0.0
    return LoraExtract(base, tuned, output, rank, svd, seed, work.done, work.whole, residual, nbytes, options.dry_run)


def _pairs(first: Checkpoint, second: Checkpoint) -> list[tuple[str, Tensor, Tensor]]:
    """Return the tensors of both models by name; raises RefusedError where names differ, or they are quantized."""
    sides = []
    for checkpoint in (first, second):
        groups = quantized_groups(checkpoint.path, checkpoint.tensors)
        if groups:
            raise RefusedError(f"the model is quantized ({groups_text(groups)})", path=checkpoint.path)
        prefix, tensors = model_tensors(checkpoint)
        sides.append({tensor.name[len(prefix) :]: tensor for tensor in tensors})
    for names, others, checkpoint in ((sides[0], sides[1], second), (sides[1], sides[0], first)):
        missing = [name for name in names if name not in others]
        if missing:
            raise RefusedError(
                f"it lacks {len(missing)} of the {len(names)} names of the other",
                path=checkpoint.path,
                details=some_of(missing),
            )
    return [(name, tensor, sides[1][name]) for name, tensor in sides[0].items()]


class _Work:
    """Makes the factors of each module when they are written."""

    def __init__(self, first: Checkpoint, second: Checkpoint, rank: int, svd: str, seed: int) -> None:
        self._checkpoints = first, second
        self._rank = rank
        self._svd = svd
        self._seed = seed
        self._last: tuple[str, Factored] | None = None
        self._noted: dict[str, None] = {}
        self._ranks: dict[str, int] = {}
        self._saved: dict[str, None] = {}
        self._transposed = False
        self._biases = False
        self.done: list[Resized] = []
        self.whole: list[str] = []
        self.total = 0.0
        self.left = 0.0

    def made(self, pairs: Sequence[tuple[str, Tensor, Tensor]], options: AdapterOptions) -> Made:
        """Return the tensors of the adapter."""
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor, _ in pairs:
            module, _, role = name.rpartition(".")
            modules.setdefault(module, {})[role] = tensor
        kinds = {module: guess(module.rpartition(".")[2], roles, ()).kind for module, roles in modules.items()}
        self._transposed = _TRANSPOSED in kinds.values()
        differing = [pair for pair in self._distinct(pairs) if not self._equal(pair[1], pair[2])]
        if not differing:
            raise RefusedError("it is equal to the other model: there is nothing to extract")
        made = Made()
        low = {name.removesuffix(".weight") for name, old, new in differing if self._is_low(name, old, new, kinds)}
        self._biases = any(name.removesuffix(".bias") in low for name, _, _ in differing if name.endswith(".bias"))
        for name, old, new in differing:
            module, _, role = name.rpartition(".")
            if role == "weight" and module in low:
                self._add(made, module, old, new, kinds[module], options)
            elif not (role == "bias" and module in low and kinds[module] != _EMBEDDING):
                self._keep(made, name, new)
        if self._biases:
            self._add_biases(made, low, pairs, options)
        return made

    def _distinct(self, pairs: Sequence[tuple[str, Tensor, Tensor]]) -> list[tuple[str, Tensor, Tensor]]:
        """Return the pairs without names that are tied to an earlier one in both models."""
        seen: dict[object, None] = {}
        found = []
        for name, old, new in pairs:
            key = (old.view, new.view)
            if None in key or key not in seen:
                found.append((name, old, new))
            seen[key] = None
        return found

    def _equal(self, old: Tensor, new: Tensor) -> bool:
        first, second = self._checkpoints
        for checkpoint, tensor in ((first, old), (second, new)):
            if tensor.storage is None:
                raise UnsupportedError(f"tensor {tensor.name!r} has no bytes of its own", path=checkpoint.path)
        if old.shape != new.shape:
            return False
        if old.dtype.name in FLOATS and new.dtype.name in FLOATS:
            return are_equal(first, old, second, new)
        if old.dtype is not new.dtype:
            return False
        from ckpt_cli.ops.aliasing import content_digest

        return content_digest(first, old) == content_digest(second, new)

    def _is_low(self, name: str, old: Tensor, new: Tensor, kinds: Mapping[str, str]) -> bool:
        """True if the difference of a tensor becomes factors."""
        module, _, role = name.rpartition(".")
        plain = role == "weight" and module and old.shape == new.shape and old.dtype.name in FLOATS
        known = kinds[module] in (_LINEAR, _TRANSPOSED, _EMBEDDING, *_CONVS)
        return bool(plain and known and new.dtype.name in FLOATS and prod(old.shape or ()))

    def _is_transposed(self, kind: str, shape: tuple[int, ...]) -> bool:
        """True if a matrix is in × out: that of a Conv1D, and in a model with these also square ones."""
        square = kind == _LINEAR and self._transposed and shape[0] == shape[1]
        return kind in (_TRANSPOSED, _EMBEDDING) or square

    def _add(self, made: Made, module: str, old: Tensor, new: Tensor, kind: str, options: AdapterOptions) -> None:
        shape = old.shape or ()
        transposed = self._is_transposed(kind, shape)
        rows, columns = shape[0], prod(shape[1:])
        outer, inner = (columns, rows) if transposed else (rows, columns)
        rank = self._ranks[module] = min(self._rank, outer, inner)
        down = (rank, *shape[1:]) if kind in _CONVS else (rank, inner)
        up = (outer, rank, *(1 for _ in shape[2:])) if kind in _CONVS else (outer, rank)
        names = ("lora_A.weight", "lora_B.weight")
        if kind == _EMBEDDING:
            names = ("lora_embedding_A", "lora_embedding_B")

        def factor(is_down: bool) -> NDArray[Any]:
            found = self._factors(module, old, new, transposed=transposed)
            return found.down if is_down else found.up

        made.add(f"{_PREFIX}{module}.{names[0]}", options.dtype, down, lambda: factor(True))
        made.add(f"{_PREFIX}{module}.{names[1]}", options.dtype, up, lambda: factor(False))

    def _factors(self, module: str, old: Tensor, new: Tensor, *, transposed: bool) -> Factored:
        from ckpt_cli.arrays.factors import factored

        if self._last is not None and self._last[0] == module:
            return self._last[1]
        shape = old.shape or ()
        difference = self._difference(old, new).reshape(shape[0], -1)
        require_finite(module, difference)
        matrix = difference.T if transposed else difference
        rank = self._ranks[module]
        found = factored(matrix, rank, self._svd, (self._seed, zlib.crc32(module.encode("utf-8", "surrogatepass"))))
        self._last = module, found
        if module not in self._noted:
            self._noted[module] = None
            self.total += found.total
            self.left += found.left
            self.done.append(Resized(module, min(matrix.shape), rank, sqrt(found.left / found.total)))
        return found

    def _difference(self, old: Tensor, new: Tensor) -> NDArray[Any]:
        found = values_of(self._checkpoints[1], new)
        found -= values_of(self._checkpoints[0], old)
        return found

    def _keep(self, made: Made, name: str, new: Tensor) -> None:
        """Take a tensor as it is."""
        from dataclasses import replace

        from ckpt_cli.arrays.cast import Losses

        Budget.of(self._checkpoints[1])
        tensors, contents = pack_plain(self._checkpoints[1], [new], Casting(None, Losses()), tied=True)
        made.keep([replace(tensors[0], name=f"{_PREFIX}{name}")], contents)
        self.whole.append(name)
        self._saved[name.rpartition(".")[0] or name] = None

    def _add_biases(
        self, made: Made, low: set[str], pairs: Sequence[tuple[str, Tensor, Tensor]], options: AdapterOptions
    ) -> None:
        """Add what is added to the biases of the modules with factors, of all that have one."""
        for name, old, new in pairs:
            module = name.removesuffix(".bias")
            if module != name and module in low:
                made.add(
                    f"{_PREFIX}{module}.lora_B.bias", options.dtype, old.shape or (),
                    lambda old=old, new=new: self._difference(old, new),  # type: ignore[misc]
                )  # fmt: skip

    def config(self, base: str) -> Mapping[str, object]:
        """Return PEFT's config."""
        if not self._ranks:
            raise RefusedError("no matrix differs, so there is nothing for an adapter of low rank")
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "task_type": None,
            "inference_mode": True,
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "fan_in_fan_out": self._transposed,
            "lora_bias": self._biases,
            "target_modules": sorted(self._ranks),
            "modules_to_save": sorted(self._saved) or None,
            **ranks_and_alphas(self._ranks, {name: float(rank) for name, rank in self._ranks.items()}),
        }
