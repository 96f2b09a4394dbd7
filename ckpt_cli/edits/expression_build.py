"""The tensors that expressions make: names are looked up, dtypes and shapes checked, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeVar

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Index, parse_index
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.edits.expression import Call, Many, Name, Node, Number, Operation, Part, wrong
from ckpt_cli.edits.expression_sources import Sources, stem_of
from ckpt_cli.errors import CkptError, NameNotFoundError, UsageError, about
from ckpt_cli.ops.select import close_names
from ckpt_cli.parallel.lazy import Filled, Home, Lazy, Leaf, Normal
from ckpt_cli.parallel.lazy_made import Computed, Converted, Joined, promoted

Result = Lazy | int | float | list[Lazy]
"""What an expression, or a part of one, comes to; `split` gives several tensors."""

_DEFAULT = BY_NAME["float32"]

Item = TypeVar("Item")


class Builder:
    """Makes lazy tensors of the nodes of one expression."""

    def __init__(self, text: str, home: Home, of: Sources) -> None:
        self._text = text
        self._home = home
        self._of = of
        self._draws = 0

    def _wrong(self, node: Node, problem: str, hint: str | None = None) -> CkptError:
        return wrong(self._text, node.at, problem, hint)

    def tensor(self, node: Node) -> Lazy:
        """Return the tensor of a node; raises ExpressionError where it is not one."""
        found = self._result(node)
        if isinstance(found, list):
            raise self._wrong(node, f"split makes {len(found)} tensors", "an index takes one of them: split(x, 2)[0]")
        if not isinstance(found, Lazy):
            raise self._wrong(node, "a tensor is expected, not a number")
        return found

    def _result(self, node: Node) -> Result:
        if isinstance(node, Number):
            return node.value
        if isinstance(node, Name):
            return self._named(node)
        if isinstance(node, Operation):
            return self._operation(node)
        if isinstance(node, Part):
            return self._part(node)
        if isinstance(node, Call):
            return self._call(node)
        raise self._wrong(node, "a tensor is expected, not a list")

    # --- names -------------------------------------------------------------------------------------------------------

    def _named(self, node: Name) -> Lazy:
        checkpoint = self._home.checkpoint if node.path is None else self._of.other(node.path)
        found, turned = self._of.tensor(checkpoint, node.name), False
        if found is None and not node.is_quoted and node.name.endswith(".T"):
            found, turned = self._of.tensor(checkpoint, stem_of(node.name)), True
        if found is None:
            if node.name in checkpoint.names:
                raise self._wrong(node, f"{node.name!r} is not a tensor")
            raise NameNotFoundError(node.name, close_names(node.name, checkpoint.names), path=checkpoint.path)
        leaf = Leaf(self._home, checkpoint, found)
        return self._turned(node, leaf) if turned else leaf

    def _turned(self, node: Node, found: Lazy) -> Lazy:
        if len(found.shape) > 2:
            raise self._wrong(
                node, f"T turns two dimensions, not those of {_spelled(found.shape)}", "permute(x, 2, 1, 0)"
            )
        return found.permute(range(len(found.shape))[::-1])

    # --- operators ---------------------------------------------------------------------------------------------------

    def _operation(self, node: Operation) -> Result:
        right = self._result(node.right)
        left = -1 if node.left is None else self._result(node.left)
        if isinstance(left, list) or isinstance(right, list):
            raise self._wrong(node, "split makes several tensors", "an index takes one of them: split(x, 2)[0]")
        operator = node.operator if node.left is not None else "*"
        if not isinstance(left, Lazy) and not isinstance(right, Lazy):
            return self._number(node, operator, left, right)
        return self._computed(node, operator, left, right)

    def _number(self, node: Operation, operator: str, left: int | float, right: int | float) -> int | float:
        try:
            if operator == "/":
                return left / right
            found = {"+": left + right, "-": left - right, "*": left * right}[operator]
            return self._bounded(node, found)
        except (ZeroDivisionError, OverflowError) as error:
            raise self._wrong(node, str(error)) from None

    def _bounded(self, node: Node, value: int | float) -> int | float:
        if isinstance(value, int) and abs(value) >= 1 << 64:
            raise self._wrong(node, "an integer of more than 64 bits")
        return value

    def _computed(self, node: Operation, operator: str, left: Lazy | int | float, right: Lazy | int | float) -> Lazy:
        tensors = [operand for operand in (left, right) if isinstance(operand, Lazy)]
        for operand in tensors:
            if operand.dtype.category not in ("float", "int") or operand.dtype.name in ("uint64", "float4_e2m1fn_x2"):
                raise self._wrong(node, f"nothing is computed with {operand.dtype}", "cast(x, float32) makes floats")
        shape = self._broadcast(node, [operand.shape for operand in tensors])
        dtype = tensors[0].dtype if len(tensors) == 1 else promoted(*tensors)
        if dtype.category == "int" and (operator == "/" or isinstance(left, float) or isinstance(right, float)):
            dtype = _DEFAULT
        made = Computed(
            self._home,
            operator,
            left.expand(shape) if isinstance(left, Lazy) else left,
            right.expand(shape) if isinstance(right, Lazy) else right,
            dtype,
            shape,
        )
        for number in (left, right):
            if not isinstance(number, Lazy):
                self._require_number(node, number, made)
        return made

    def _require_number(self, node: Node, number: int | float, made: Computed) -> None:
        """Raise ExpressionError for a number that the values which are computed with cannot hold."""
        most = {"int64": 2.0**63 - 1, "float32": 3.4028235e38}.get(made.kind, 1.8e308)
        if abs(number) > most and number not in (float("inf"), float("-inf")):
            raise self._wrong(node, f"{number} is too large for {made.kind}")

    def _broadcast(self, node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape that both operands are repeated to."""
        if len(shapes) == 1:
            return shapes[0]
        one, other = shapes
        most = max(len(one), len(other))
        pairs = list(zip((1,) * (most - len(one)) + one, (1,) * (most - len(other)) + other, strict=True))
        if any(a != b and 1 not in (a, b) for a, b in pairs):
            raise self._wrong(node, f"shapes {_spelled(one)} and {_spelled(other)} do not go together")
        return tuple(b if a == 1 else a for a, b in pairs)

    def _part(self, node: Part) -> Result:
        inner = self._result(node.of)
        index = self._about(node, lambda: parse_index(node.index))
        if isinstance(inner, list):
            return self._one_of(node, inner, index)
        if not isinstance(inner, Lazy):
            raise self._wrong(node, "a number takes no index")
        return self._about(node, lambda: inner.at(index))

    def _one_of(self, node: Node, parts: list[Lazy], index: Index) -> Lazy:
        if len(index) != 1 or not isinstance(index[0], int) or not -len(parts) <= index[0] < len(parts):
            raise self._wrong(node, f"an index from 0 to {len(parts) - 1} takes one of the parts")
        return parts[index[0]]

    def _about(self, node: Node, work: Callable[[], Item]) -> Item:
        """Return what is worked out; errors say where in the expression that is."""
        try:
            return work()
        except UsageError as error:
            raise self._wrong(node, error.problem, error.hint) from None

    # --- functions ---------------------------------------------------------------------------------------------------

    def _call(self, node: Call) -> Result:
        allowed = _OPTIONS.get(node.function, ())
        for option, value in node.options.items():
            if option not in allowed:
                known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
                raise self._wrong(value, f"{node.function} has no option {option!r}", known)
        works: dict[str, Callable[[Call], Result]] = {
            "cat": self._cat, "stack": self._stack, "split": self._split, "transpose": self._transpose,
            "permute": self._permute, "reshape": self._reshape, "cast": self._cast, "normal": self._normal,
            "T": lambda each: self._turned(each, self.tensor(self._only(each)[0])),
            "copy": lambda each: self.tensor(self._only(each)[0]),
            "zeros": lambda each: self._filled(each, 0), "ones": lambda each: self._filled(each, 1),
            "full": lambda each: self._filled(each, None),
        }  # fmt: skip
        return works[node.function](node)

    def _only(self, node: Call, least: int = 1, most: int = 1) -> Sequence[Node]:
        """Return the arguments of a call; raises ExpressionError for too few or too many."""
        if not least <= len(node.arguments) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise self._wrong(node, f"{node.function} takes {wanted} arguments, not {len(node.arguments)}")
        return node.arguments

    def _integer(self, node: Node) -> int:
        value = self._result(node) if not isinstance(node, Many) else None
        if not isinstance(value, int):
            raise self._wrong(node, "an integer is expected")
        return value

    def _real(self, node: Node) -> float | int:
        value = self._result(node) if not isinstance(node, Many) else None
        if not isinstance(value, int | float):
            raise self._wrong(node, "a number is expected")
        return value

    def _integers(self, nodes: Sequence[Node]) -> list[int]:
        """Return integers: several arguments, or one list of them."""
        if len(nodes) == 1 and isinstance(nodes[0], Many):
            nodes = nodes[0].items
        return [self._integer(node) for node in nodes]

    def _dim(self, node: Call, rank: int, default: int = 0, number: Node | None = None) -> int:
        """Return a dimension, counted from the front."""
        given = number or node.options.get("dim")
        dim = default if given is None else self._integer(given)
        if not -rank <= dim < rank:
            raise self._wrong(given or node, f"there is no dimension {dim} of {rank}")
        return dim % rank

    def _members(self, node: Call) -> list[Lazy]:
        """Return the tensors that are joined."""
        nodes = node.arguments
        if len(nodes) == 1 and isinstance(nodes[0], Many):
            nodes = nodes[0].items
        found: list[Lazy] = []
        for each in nodes:
            is_split = isinstance(each, Call) and each.function == "split"
            found += self._split(each) if is_split and isinstance(each, Call) else [self.tensor(each)]
        if not found:
            raise self._wrong(node, f"{node.function} takes tensors")
        kinds = {member.dtype.name for member in found}
        if len(kinds) > 1:
            raise self._wrong(
                node, f"{node.function} of {', '.join(sorted(kinds))}", f"cast(x, {sorted(kinds)[0]}) makes them alike"
            )
        return found

    def _cat(self, node: Call) -> Lazy:
        members = self._members(node)
        first = members[0].shape
        if not first:
            raise self._wrong(node, "tensors without dimensions cannot be joined", "stack(x, y) makes a new dimension")
        dim = self._dim(node, len(first))
        for member in members:
            shape = member.shape
            if len(shape) != len(first) or shape[:dim] + shape[dim + 1 :] != first[:dim] + first[dim + 1 :]:
                raise self._wrong(
                    node, f"shapes {_spelled(first)} and {_spelled(shape)} cannot be joined along dimension {dim}"
                )
        return members[0] if len(members) == 1 else Joined(members, dim)

    def _stack(self, node: Call) -> Lazy:
        members = self._members(node)
        other = next((member.shape for member in members if member.shape != members[0].shape), None)
        if other is not None:
            raise self._wrong(node, f"shapes {_spelled(members[0].shape)} and {_spelled(other)} cannot be stacked")
        rank = len(members[0].shape)
        dim = self._dim(node, rank + 1)
        order = [*range(1, dim + 1), 0, *range(dim + 1, rank + 1)]
        new = [member.expand((1, *member.shape)).permute(order) for member in members]
        return new[0] if len(new) == 1 else Joined(new, dim)

    def _split(self, node: Call) -> list[Lazy]:
        """Return equal parts, or parts of the sizes that are given."""
        first, how = self._only(node, 2, 2)
        inner = self.tensor(first)
        if not inner.shape:
            raise self._wrong(node, "a tensor without dimensions cannot be split")
        dim = self._dim(node, len(inner.shape))
        size = inner.shape[dim]
        if isinstance(how, Many):
            sizes = self._integers([how])
            if any(each < 0 for each in sizes) or sum(sizes) != size:
                raise self._wrong(how, f"the sizes come to {sum(sizes)}, and dimension {dim} has {size}")
        else:
            count = self._integer(how)
            if not 0 < count <= max(size, 1) or size % count:
                raise self._wrong(how, f"{size} rows cannot be split into {count} equal parts", "split(x, [2, 3])")
            if count > limits.EXPRESSION_NODES:
                raise self._wrong(how, "too many parts", "an index takes a part: x[0:10]")
            sizes = [size // count] * count
        parts, begin = [], 0
        for each in sizes:
            parts.append(inner.at((*(slice(None) for _ in range(dim)), slice(begin, begin + each))))
            begin += each
        return parts

    def _transpose(self, node: Call) -> Lazy:
        first, *dims = self._only(node, 1, 3)
        inner = self.tensor(first)
        if not dims:
            return self._turned(node, inner)
        if len(dims) == 1:
            raise self._wrong(node, "transpose takes two dimensions")
        order = list(range(len(inner.shape)))
        one, other = (self._dim(node, len(order), number=dim) for dim in dims)
        order[one], order[other] = order[other], order[one]
        return inner.permute(order)

    def _permute(self, node: Call) -> Lazy:
        first, *given = self._only(node, 2, _DIMENSIONS + 1)
        inner = self.tensor(first)
        rank = len(inner.shape)
        dims = [dim % rank if rank and -rank <= dim < rank else -1 for dim in self._integers(given)]
        if sorted(dims) != list(range(rank)):
            raise self._wrong(node, f"permute takes each of {rank} dimensions once")
        return inner.permute(dims)

    def _reshape(self, node: Call) -> Lazy:
        first, *given = self._only(node, 2, _DIMENSIONS + 1)
        inner = self.tensor(first)
        shape = self._integers(given)
        rest = prod(size for size in shape if size != -1)
        if shape.count(-1) == 1 and rest and not inner.numel % rest:
            shape[shape.index(-1)] = inner.numel // rest
        if any(size < 0 for size in shape) or prod(shape) != inner.numel or len(shape) > _DIMENSIONS:
            raise self._wrong(node, f"{_spelled(inner.shape)} does not become {_spelled(shape)}")
        return inner.reshape(tuple(shape))

    def _dtype(self, node: Node) -> DType:
        from ckpt_cli.edits.set_new import dtype_of_new

        if not isinstance(node, Name):
            raise self._wrong(node, "a dtype is expected")
        return self._about(node, lambda: dtype_of_new(node.name))

    def _cast(self, node: Call) -> Lazy:
        first, dtype = self._only(node, 2, 2)
        inner, wanted = self.tensor(first), self._dtype(dtype)
        return inner if inner.dtype is wanted else Converted(inner, wanted)

    def _shape(self, node: Node) -> tuple[int, ...]:
        shape = tuple(self._integers([node]))
        if any(size < 0 for size in shape) or len(shape) > _DIMENSIONS or prod(shape) > limits.EXPRESSION_BYTES:
            raise self._wrong(node, f"{_spelled(shape)} is not a shape that can be made")
        return shape

    def _filled(self, node: Call, value: int | None) -> Lazy:
        """Return a tensor of one number: its shape, the number unless it is known, and a dtype."""
        import numpy as np

        arguments = list(self._only(node, 1 if value is not None else 2, 2 if value is not None else 3))
        shape = self._shape(arguments.pop(0))
        number = self._real(arguments.pop(0)) if value is None else value
        given = arguments[0] if arguments else node.options.get("dtype")
        if given is None and isinstance(number, int) and value is None:
            dtype = BY_NAME["int64"]
        else:
            dtype = _DEFAULT if given is None else self._dtype(given)
        from ckpt_cli.arrays.steps import codec_of

        with about(self._home.checkpoint.path):
            values = np.array(number, object if isinstance(number, int) else np.float64)
            element = codec_of(dtype, self._home.name).encode(values, cast=self._home.allow).tobytes()
        return Filled(self._home, dtype, shape, element)

    def _normal(self, node: Call) -> Lazy:
        from ckpt_cli.arrays.random_normal import NormalSource, key_of

        shape = self._shape(self._only(node)[0])
        options = node.options
        std, mean = (
            self._real(options[key]) if key in options else default for key, default in (("std", 1), ("mean", 0))
        )
        if not (0 <= std < float("inf") and abs(mean) < float("inf")):
            raise self._wrong(node, "std and mean are finite numbers, and std is not negative")
        seed = self._integer(options["seed"]) if "seed" in options else 0
        dtype = self._dtype(options["dtype"]) if "dtype" in options else _DEFAULT
        if dtype.category != "float":
            raise self._wrong(node, f"normal numbers are floats, not {dtype}")
        source = NormalSource(key_of(seed, self._home.name, self._draws))
        self._draws += 1
        return Normal(self._home, dtype, shape, source, float(mean), float(std))


_OPTIONS: Mapping[str, Sequence[str]] = {
    "cat": ("dim",), "stack": ("dim",), "split": ("dim",), "zeros": ("dtype",), "ones": ("dtype",), "full": ("dtype",),
    "normal": ("std", "mean", "seed", "dtype"),
}  # fmt: skip
"""The options of each function that has some."""

_DIMENSIONS = 64
"""Dimensions of a new tensor: numpy has no more."""


def _spelled(shape: Sequence[int]) -> str:
    return str(list(shape))
