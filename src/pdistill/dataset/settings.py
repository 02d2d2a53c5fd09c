"""Checks of the keys below `dataset`: each refuses a wrong value in one line that names the key."""

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pdistill.errors import UserError, printable


def fraction(key: str, value: Any) -> float:
    """`value`, if it is a number from 0 to 1; else raises UserError."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not known or not 0 <= value <= 1:
        raise UserError(f"dataset.{key}={value} must be a number from 0 to 1, such as 0.001")
    return float(value)


def flag(key: str, value: Any) -> bool:
    """`value`, if it is true or false; else raises UserError. ("no" would count as true.)"""
    if not isinstance(value, bool):
        raise UserError(f"dataset.{key}={value} must be true or false")
    return value


def choice(key: str, value: Any, choices: Collection[Any]) -> Any:
    """`value`, if it is among `choices`; else raises UserError."""
    if isinstance(value, bool) or value not in choices:
        raise UserError(f"dataset.{key}={value} must be one of {', '.join(map(str, choices))}")
    return value


def location(key: str, value: Any, hint: str) -> Path:
    """The path that a key names, ~ expanded. Raises UserError, which ends in `hint`, where it names none."""
    if value is None or value == "":
        raise UserError(f"dataset.{key} is missing: {hint}")
    if not isinstance(value, str | int | os.PathLike) or isinstance(value, bool) or "\0" in str(value):
        raise UserError(f"dataset.{key}={shown(value)} is not a path: {hint}")
    try:
        return Path(str(value)).expanduser()
    except RuntimeError as error:
        raise UserError(f"dataset.{key}={shown(value)}: there is no such home directory; give a full path") from error


def shown(name: Any) -> str:
    """A name for a message: in one line, bytes that are not UTF-8 as \\xe9."""
    try:
        text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # of no file: half a character, as JSON can say it
        text = str(name)
    return printable(text)


def reason(error: BaseException) -> str:
    """What an error says, in one line; the name of its class where it says nothing."""
    return shown(" ".join(str(error).split())) or type(error).__name__
