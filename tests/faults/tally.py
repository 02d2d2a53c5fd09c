"""How many faults were tried, and how many a run survived: printed at the end of the tests."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

tried: Counter[str] = Counter()
survived: Counter[str] = Counter()


@contextmanager
def faults(kind: str, number: int = 1) -> Iterator[None]:
    """So many faults of a kind; the block checks that they were survived, and raises otherwise."""
    tried[kind] += number
    yield
    survived[kind] += number


def lines() -> list[str]:
    """A line for each kind, and the sum."""
    rows = [f"{survived[kind]:4d} of {tried[kind]:4d} survived: {kind}" for kind in sorted(tried)]
    return [*rows, f"{survived.total():4d} of {tried.total():4d} survived in all"] if rows else []
