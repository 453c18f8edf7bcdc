"""The values that a recipe's fields may have, written beside their types: `steps: Annotated[int, Bounds(least=1)]`."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from functools import cache
from numbers import Real
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of every number of a field; `reason` explains a bound that is not obvious."""

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
Draws = Annotated[int, Bounds(least=1, most=100_000)]  # of noise; more change nothing that could be measured
Pixels = Annotated[int, Bounds(least=1, most=16_384)]  # on a side of an image, as `checks_nim.MAX_SIDE_PIXELS`
Weight = Annotated[float, Bounds(least=0, most=1_000_000)]  # of a part of a loss


def check_fields(section: Any, prefix: str = "") -> None:
    """For `__post_init__` of a recipe's dataclass: every field keeps to its `Bounds`; `prefix` goes before its name.

    Also without `Bounds`, numbers must be finite and fit in 64 bits, and texts must not be empty.

    Raises ValueError that names the key, the value and what is allowed.
    """
    for field in dataclasses.fields(section):
        check_value(getattr(section, field.name), type(section), field.name, prefix + field.name)


def check_list(values: list | None, key: str) -> None:
    """Checks a list of things to do: ValueError where it is empty or an item stands twice.

    None, which recipes may give in place of such a list, is allowed.
    """
    if values is None:
        return
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{key} must be a list, got {values!r}")
    if not values:
        raise ValueError(f"{key} is an empty list; name at least one, or leave it out")
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{key} names {value!r} twice; once is enough")


def check_value(value: Any, schema: type, field: str, key: str) -> None:
    """The same for one value of `schema`'s field `field`, called `key` in the message."""
    bounds, kinds = _allowed(schema)[field]
    numbers = kinds & {int, float}
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if numbers and (isinstance(item, (list, dict)) or (isinstance(item, str) and str not in kinds)):
            raise ValueError(f"{key} must be a number, got {item!r}")
        if numbers and isinstance(item, bool) and bool not in kinds:
            raise ValueError(f"{key} must be a number, got {item!r}")
        if isinstance(item, bool) or not isinstance(item, (Real, str)):  # numpy's numbers are real ones, too
            continue
        if isinstance(item, float) and numbers == {int}:
            raise ValueError(f"{key} must be a whole number, got {item!r}")
        if isinstance(item, str):
            if not item.strip() or "\0" in item:
                raise ValueError(f"{key} must be a text without NUL characters that is not empty, got {item!r}")
            continue
        if not math.isfinite(item) or (isinstance(item, int) and abs(item) >= 2**63):
            raise ValueError(f"{key} must be a finite number of at most 64 bits, got {item}")
        if bounds is not None and not bounds.admit(item):
            raise ValueError(f"{key} must be {bounds}, got {item}")


@cache
def _allowed(schema: type) -> dict[str, tuple[Bounds | None, set[Any]]]:
    """For each field its bounds, if it has any, and the types that stand in its hint."""
    hints = typing.get_type_hints(schema, include_extras=True)
    parts = {name: list(parts_of(hint)) for name, hint in hints.items()}
    return {
        name: (next((part for part in found if isinstance(part, Bounds)), None), set(filter(_is_type, found)))
        for name, found in parts.items()
    }


def parts_of(hint: Any) -> Iterator[Any]:
    """A hint and everything in it: types, literals, `Bounds`, however deep in unions and lists they stand."""
    yield hint
    for part in typing.get_args(hint) if not isinstance(hint, Bounds) else ():
        yield from parts_of(part)


def _is_type(part: Any) -> bool:
    return isinstance(part, type)
