"""The decorator `dataclass` for facts: as that of the standard library, but cheap to make and to fill.

The standard one compiles up to six methods for each class, which took a third of the start of `ckpt ls`. Here only
`__init__` is compiled; the other methods are shared, and look at the fields when they are called. For the type checker
this is the standard decorator, so that it refuses assignments to frozen fields. At run time nothing does: so an object
is made several times as fast, and a large file has 100,000 of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    import dataclasses
    from functools import cache
    from operator import attrgetter
    from reprlib import recursive_repr

    def dataclass(*, frozen=False, slots=False, kw_only=False, order=False, eq=True, unsafe_hash=False):
        """Return a decorator with the parameters of `dataclasses.dataclass`, those that facts need."""

        def make(plain):
            hash_given = plain.__dict__.get("__hash__") is not None
            made = dataclasses.dataclass(slots=slots, kw_only=kw_only, order=order, eq=order, repr=False)(plain)
            shared = {"__repr__": _repr}
            if eq:
                shared["__eq__"] = _eq
            if frozen:
                shared |= {"__getstate__": _getstate, "__setstate__": _setstate}
            for name, method in shared.items():
                if name not in made.__dict__:
                    setattr(made, name, method)
            if eq and not hash_given:
                made.__hash__ = _hash if frozen or unsafe_hash else None
            return made

        return make

    @cache
    def _compared(made):
        """Return the function that gives what is compared of an object of the class: a tuple of fields."""
        names = [field.name for field in dataclasses.fields(made) if field.compare]
        return attrgetter(*names) if len(names) > 1 else lambda fact: tuple(getattr(fact, name) for name in names)

    def _eq(self, other):
        if other.__class__ is not self.__class__:
            return NotImplemented
        compared = _compared(self.__class__)
        return compared(self) == compared(other)

    def _hash(self):
        return hash(_compared(self.__class__)(self))

    @recursive_repr("...")
    def _repr(self):
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if f.repr)
        return f"{self.__class__.__qualname__}({fields})"

    def _getstate(self):
        """Return the values alone, for a worker process that is sent many facts."""
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def _setstate(self, values):
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)
