"""What a config key may be: declared once, beside its default, and read by everything that asks."""

import copy
import dataclasses
import math
import operator
import os
import types
from collections.abc import Iterator
from typing import Any, ClassVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from pyramid_ldm.errors import UserError

FORMAT = 1  # of saved configs; those without a number are older

BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
_UNSAID = object()


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def key(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    may_change: bool = False,
    before: Any = _UNSAID,
    since: int = FORMAT,
) -> Any:
    """A dataclass field with what its values may be.

    Args:
        default: a value, or a class or function that makes one; a list is copied.
        at_least, above, at_most, below: of a number, or of every number of a list. A number is finite in any case.
        choices: of a string.
        path: a string that names a file or a folder; a leading ~ is the user's home.
        may_change: whether a run that is resumed may have another value; everything else is what the run *is*. Of a
            section: of all its keys.
        before, since: what a config means that was saved in a format before `since`, when there was no such key.
    """
    metadata = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "choices": choices,
                "path": path, "may_change": may_change, "since": since}  # fmt: skip
    if before is not _UNSAID:
        metadata["before"] = before
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(field_specifiers=(key, dataclasses.field))
class Section:
    """A part of a config; subclasses are dataclasses. Creating one checks that its values are in range."""

    NAME: ClassVar[str] = ""  # in front of its keys
    KIND: ClassVar[str] = ""  # of a config that is saved alone

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name = f"{self.NAME}.{field.name}" if self.NAME else field.name
            value = getattr(self, field.name)
            if field.metadata.get("path") and value is not None:
                require(value.strip() != "", f"{name} is empty; give a path")
                setattr(self, field.name, os.path.expanduser(value))
            for one in value if isinstance(value, list) else [value]:
                check_value(name, one, field.metadata, value)


def check_value(name: str, value: Any, rules: Any, shown: Any) -> None:
    """UserError where a number or a string is not what its key allows; `shown` is what the message quotes."""
    if isinstance(value, str) and rules.get("choices"):
        choices = rules["choices"]
        require(value in choices, f"{name} is {shown!r}; choose one of {', '.join(choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    require(isinstance(value, int) or math.isfinite(value), f"{name} is {shown}; give a finite number")
    for bound, holds in BOUNDS.items():
        limit = rules.get(bound)
        require(
            limit is None or holds(value, limit), f"{name} is {shown}; it must be {bound.replace('_', ' ')} {limit}"
        )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One key of a schema."""

    name: str  # dotted
    type: Any
    rules: Any  # what `key` was told
    may_change: bool

    @property
    def number(self) -> type | None:
        """int or float, also of a list of them or where null is allowed; else None."""
        kind = element(optional(self.type)[0])
        return kind if kind in (int, float) else None


def leaves(schema: type, prefix: str = "", may_change: bool = False) -> Iterator[Leaf]:
    """Every key below a section, with those of its parts; lists are keys."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        free = may_change or field.metadata.get("may_change", False)
        kind = optional(hints[field.name])[0]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{field.name}.", free)  # type: ignore[arg-type]
        else:
            yield Leaf(prefix + field.name, hints[field.name], field.metadata, free)


def optional(kind: Any) -> tuple[Any, bool]:
    """(T, True) for `T | None`, (T, False) for T."""
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (part for part in get_args(kind) if part is not type(None))
        return inner, True
    return kind, False


def element(kind: Any) -> Any:
    """T for list[T], else the type itself."""
    return get_args(kind)[0] if get_origin(kind) is list else kind
