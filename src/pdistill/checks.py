"""Checks of settings: a value that cannot be is refused in one line that names its key; no torch."""

import math

from pdistill.errors import UserError

MOST_STEPS = 1_000_000  # of a sampler


def whole(key: str, value: object, least: int) -> None:
    """Raises UserError unless the value of the key is a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{key}={value} must be a whole number, at least {least}")


def is_count(value: object) -> bool:
    """Whether it can be a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_STEPS


def number(key: str, value: object, limit: float = math.inf, null: bool = False) -> None:
    """Raises UserError unless the value of the key is a number in [0, limit), or None where `null`."""
    if value is None and null:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < limit:
        raise UserError(f"{key}={value} must be a number in [0, {limit}){' or null' if null else ''}")


def flag(key: str, value: object) -> None:
    """Raises UserError unless the value of the key is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={value} must be true or false")
