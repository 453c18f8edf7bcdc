"""The values that a recipe's fields may have, written beside their types: `steps: Annotated[int, Bounds(least=1)]`."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What every number of a field must keep to; `reason` is for a bound that does not speak for itself."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        words = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
        parts = [
            f"{text} {value:g}" if abs(value) < 1e6 else f"{text} {value}"
            for name, text in words.items()
            if (value := getattr(self, name)) is not None
        ]
        return " and ".join(parts) + (f" ({self.reason})" if self.reason else "")

    def admit(self, value: float) -> bool:
        """Whether `value` is within; NaN never is."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


Seed = Annotated[int, Bounds(least=0, most=2**32 - 1, reason="numpy's seeds have 32 bits")]
Count = Annotated[int, Bounds(least=1, most=2**40)]
Share = Annotated[float, Bounds(least=0, most=1)]


def check_fields(section: Any, prefix: str = "") -> None:
    """For `__post_init__` of a recipe's dataclass: every field keeps to its `Bounds`; `prefix` goes before its name.

    Numbers are finite and fit in 64 bits, and texts are not empty, without being told.

    Raises ValueError that names the key, the value and what is allowed.
    """
    for field in dataclasses.fields(section):
        check_value(getattr(section, field.name), type(section), field.name, prefix + field.name)


def check_value(value: Any, schema: type, field: str, key: str) -> None:
    """The same for one value of `schema`'s field `field`, called `key` in the message."""
    bounds = _bounds(schema)[field]
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, bool) or not isinstance(item, (int, float, str)):
            continue
        if isinstance(item, str):
            if not item.strip() or "\0" in item:
                raise ValueError(f"{key} must be a text without NUL characters that is not empty, got {item!r}")
            continue
        if not math.isfinite(item) or (isinstance(item, int) and abs(item) >= 2**63):
            raise ValueError(f"{key} must be a finite number of at most 64 bits, got {item}")
        if bounds is not None and not bounds.admit(item):
            raise ValueError(f"{key} must be {bounds}, got {item}")


@cache
def _bounds(schema: type) -> dict[str, Bounds | None]:
    hints = typing.get_type_hints(schema, include_extras=True)
    return {name: next(_bounds_within(hint), None) for name, hint in hints.items()}


def _bounds_within(hint: Any) -> Iterator[Bounds]:
    """The bounds in a hint, however deep in unions and lists they stand."""
    yield from (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bounds))
    for part in typing.get_args(hint):
        if not isinstance(part, Bounds):
            yield from _bounds_within(part)
