"""Numbers in words, with as many digits as they deserve: what a spread supports, or else three.

What is missing or not finite is "".
"""

import statistics
from collections.abc import Sequence

from pdistill.report.runs import finite

SIGNIFICANT = 3  # digits of a value whose spread nobody knows
PLAIN = range(-5, 9)  # powers of ten that are written without one
MOST_DECIMALS = 8


def _power(value: float, digits: int = 1) -> int:
    """The power of ten of a number that is rounded to so many digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def number(value: object, digits: int = SIGNIFICANT) -> str:
    """With so many significant digits: 0.0123, 8.59, 725; whole numbers keep all of theirs."""
    found = finite(value)
    if not found:
        return "" if found is None else "0"
    power = _power(found, digits)
    return f"{found:.{max(0, digits - 1 - power)}f}" if power in PLAIN else f"{found:.{digits - 1}e}"


def supported(value: object, spread: object, digits: int = SIGNIFICANT) -> str:
    """The value alone, to the first digit of its spread: 32.8 with a spread of 2.3 is 33."""
    found, known = finite(value), finite(spread)
    if found is None or not known or known < 0 or _power(found) not in PLAIN:
        return number(value, digits)
    return f"{found:.{min(MOST_DECIMALS, max(0, -_power(known)))}f}"


def with_spread(value: object, spread: object) -> str:
    """ "2.11 ± 0.03": the spread with two digits, the value to the same place; the value alone without a spread."""
    found, known = finite(value), finite(spread)
    if found is None or known is None or known < 0:
        return number(value)
    if known == 0:
        return f"{number(found)} ± 0"
    decimals = max(0, 1 - _power(known, 2))
    if decimals > MOST_DECIMALS or max(abs(found), known) >= 10.0 ** max(PLAIN):
        return f"{number(found)} ± {number(known, 2)}"
    return f"{found:.{decimals}f} ± {known:.{decimals}f}"


def mean_and_spread(values: Sequence[float] | None) -> str:
    """Mean and sample standard deviation, the latter where there is more than one value."""
    if not values:
        return ""
    return with_spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
