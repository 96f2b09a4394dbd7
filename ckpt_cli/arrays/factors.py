"""Matrices as products of two thin ones: exactly or by random projections, and products of a lower rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

EXACT, RANDOMIZED = "exact", "randomized"

_MORE = 10
"""Projections beyond the rank, which make the last singular values right."""

_ROUNDED = 1e-6
"""The part of a sum of squares that rounding may take away."""

_TIMES = 4
"""Times that the projections go through the matrix and back."""


@dataclass(frozen=True, slots=True)
class Factored:
    """The best product of two matrices of a rank, or nearly that: `up @ down`."""

    down: Array
    """r × in."""
    up: Array
    """out × r."""
    total: float
    """The sum of the squares of the matrix."""
    left: float
    """The sum of the squares of what the product lacks."""


def factored(matrix: Array, rank: int, method: str, seed: tuple[int, ...]) -> Factored:
    """Return the factors of a matrix of float32: U √S and √S Vᵀ of the greatest singular values.

    By random projections the subspace is that of Halko, Martinsson and Tropp (2011), algorithm 4.4; the same `seed`
    gives the same factors.
    """
    import numpy as np

    total = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    few = min(rank + _MORE, *matrix.shape)
    if method == EXACT or few == min(matrix.shape):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    else:
        noise = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        basis = np.linalg.qr(matrix @ noise.standard_normal((matrix.shape[1], few), np.float32))[0]
        for _ in range(_TIMES):
            basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
        left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    return _split(left, values, right, rank, total)


def refactored(down: Array, up: Array, rank: int) -> Factored:
    """Return the factors of a lower rank of a product of two matrices, by QR of each and a small decomposition."""
    import numpy as np

    left, inner = np.linalg.qr(up.astype(np.float64))
    right, other = np.linalg.qr(down.astype(np.float64).T)
    first, values, second = np.linalg.svd(inner @ other.T, full_matrices=False)
    return _split(left @ first, values, second @ right.T, rank, float((values**2).sum()))


def _split(left: Array, values: Array, right: Array, rank: int, total: float) -> Factored:
    import numpy as np

    roots = np.sqrt(values[:rank])
    squares = values.astype(np.float64) ** 2
    outside = total - float(squares.sum())  # of the subspace of all these values; float32 rounds, too
    left_out = float(squares[rank:].sum()) + (outside if outside > _ROUNDED * total else 0.0)
    down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
    lacking = rank - down.shape[0]  # where the matrix has fewer rows or columns
    down, up = np.pad(down, ((0, lacking), (0, 0))), np.pad(up, ((0, 0), (0, lacking)))
    return Factored(down.astype(np.float32), up.astype(np.float32), total, left_out)
