"""Numbers of a normal distribution, each of which depends on a key and its own place only.

So any piece of a tensor is made by itself, with the same bits whatever the pieces are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 4096
"""Numbers that are always made together, so that each goes through the same steps of numpy in every piece."""


@dataclass(frozen=True, slots=True)
class NormalSource:
    """A row of normal numbers without end: Philox 4×64-10 by numpy, and the transform of Box and Muller.

    The numbers 2k and 2k + 1 are made of the words 2k and 2k + 1 of the generator: with u = (the upper 53 bits of the
    first + 1) / 2⁵³ and v = (those of the second) / 2⁵³ they are √(−2 ln u) times cos 2πv and sin 2πv.
    """

    key: int
    """The key of the generator: 128 bits."""

    def numbers(self, begin: int, end: int) -> NDArray[Any]:
        """Return the numbers from `begin` on and before `end`, as float64."""
        import numpy as np

        first, last = begin // _BLOCK, -(-end // _BLOCK)
        found = np.empty((last - first) * _BLOCK, np.float64)
        for block in range(first, last):
            at = (block - first) * _BLOCK
            found[at : at + _BLOCK] = self._block(block)
        return found[begin - first * _BLOCK : end - first * _BLOCK]

    def _block(self, number: int) -> NDArray[Any]:
        """Return one block: the generator's counter counts four words."""
        import numpy as np

        words = np.random.Philox(key=self.key, counter=number * _BLOCK // 4).random_raw(_BLOCK)
        upper = (words >> np.uint64(11)).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((upper[::2] + 1.0) * 2.0**-53))
        angle = upper[1::2] * (2.0**-53 * 2 * np.pi)
        found = np.empty(_BLOCK, np.float64)
        found[::2] = radius * np.cos(angle)
        found[1::2] = radius * np.sin(angle)
        return found


def key_of(seed: int, name: str, number: int = 0) -> int:
    """Return the key for a seed and the name of a tensor; `number` tells several sources of one tensor apart."""
    from hashlib import sha256

    return int.from_bytes(sha256(f"{seed}\0{number}\0{name}".encode()).digest()[:16], "little")
