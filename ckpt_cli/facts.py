"""The decorator `dataclass` for facts: as that of the standard library, but cheap to make and to fill.

The standard one compiles up to six methods for each class, which took a third of the start of `ckpt ls`. Here only
`__init__` is compiled, when the first object of the class is made, as most commands make objects of few classes; the
other methods are shared, and look at the fields when they are called. For the type checker this is the standard
decorator, so that it refuses assignments to frozen fields. At run time nothing does: so an object is made several times
as fast, and a large file has 100,000 of them. A class with `__post_init__`, which nothing would call, is refused.
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
            if hasattr(plain, "__post_init__"):
                raise TypeError(f"{plain.__qualname__}: facts have no __post_init__")
            hash_given = plain.__dict__.get("__hash__") is not None
            settings = {"slots": slots, "kw_only": kw_only, "order": order, "eq": order}
            made = dataclasses.dataclass(init=False, repr=False, **settings)(plain)
            shared = {"__init__": _late_init(made), "__repr__": _repr}
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

    def _late_init(made):
        """Return an `__init__` that puts the compiled one in its place when it is first called."""

        def first(self, *values, **named):
            made.__init__ = _compiled_init(made)
            made.__init__(self, *values, **named)

        first.__name__, first.__qualname__ = "__init__", f"{made.__qualname__}.__init__"
        return first

    def _compiled_init(made):
        """Return a function that sets the fields to its arguments, or to what they are without one."""
        names = {"missing": dataclasses.MISSING}
        parameters, by_name, lines = ["self"], [], ["pass"]
        for field in dataclasses.fields(made):
            name = field.name
            names[f"default_{name}"], names[f"make_{name}"] = field.default, field.default_factory
            if field.default_factory is not dataclasses.MISSING:
                default, otherwise = "=missing", f"make_{name}()"
                value = f"{otherwise} if {name} is missing else {name}"
            elif field.default is not dataclasses.MISSING:
                default, otherwise, value = f"=default_{name}", f"default_{name}", name
            else:
                default, otherwise, value = "", "", name
            if field.init:
                (by_name if field.kw_only else parameters).append(name + default)
                lines.append(f"self.{name} = {value}")
            elif otherwise:
                lines.append(f"self.{name} = {otherwise}")
        if by_name:
            parameters += ["*", *by_name]
        text = f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines)
        exec(text, names)  # noqa: S102 - names of fields, from the source
        names["__init__"].__qualname__ = f"{made.__qualname__}.__init__"
        return names["__init__"]

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
