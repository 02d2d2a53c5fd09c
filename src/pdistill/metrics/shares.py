"""Work that several processes share: batches in turns, their results in order, errors that all of them raise."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from pdistill.bars import bar
from pdistill.display import MEASURING
from pdistill.errors import UserError
from pdistill.processes import gather, is_main, rank, world_size

T = TypeVar("T")


def leads() -> bool:
    """True in the process that keeps what all have made, and in one that works alone."""
    return is_main() or world_size() == 1


def my_batches(total: int, batch_size: int, title: str) -> Iterator[range]:
    """This process's batches of range(total), in turns: the same batches for any number of processes.

    The main process shows a bar with the time left.
    """
    first = rank() if world_size() > 1 else 0
    starts = range(0, total, batch_size)[first :: world_size()]
    for start in bar(starts, title, unit="batch", phase=MEASURING):
        yield range(start, min(start + batch_size, total))


def in_order(mine: list[T]) -> list[T]:
    """What all processes made of their `my_batches`, in the order of the batches, on every process."""
    everyones: list[list[T]] = gather(mine)
    return [of_rank[i] for i in range(len(everyones[0])) for of_rank in everyones if i < len(of_rank)]


def together(work: Callable[[], T]) -> T:
    """`work()` in every process. Where it raises UserError in one, all raise it: none is left waiting for another."""
    problem, result = None, None
    try:
        result = work()
    except UserError as error:
        problem = error
    if problems := [text for text in gather(None if problem is None else str(problem)) if text is not None]:
        raise problem or UserError(problems[0])
    return result  # type: ignore[return-value]
