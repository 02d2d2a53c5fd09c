"""Who draws when: of each visitor the newest wish alone, and one wish at a time.

A click does not wait for the clicks before it: a wish that is no longer the newest of its visitor ends at the next
evaluation of a network, or before it has begun. So work never piles up, however fast somebody clicks.
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pdistill.errors import UserError, first_line, printable
from pdistill.play.drawing import Strip, Wish, draw
from pdistill.play.lineup import Lineup, Player

SECONDS_BETWEEN_NEWS = 0.25
MOST_VISITORS = 1000  # that are remembered


class Outdated(Exception):
    """There is a newer wish, or nobody waits for this one any more."""


@dataclass(frozen=True)
class News:
    """What has happened since: a line is done or cannot be, or how far the one in work is."""

    status: str = ""
    line: int | None = None
    strip: Strip | None = None
    problem: str = ""
    """In place of pictures: what was wrong with the wish, in a line."""
    is_last: bool = False


@dataclass
class Turns:
    """The wishes of all visitors of a page; `stamp` grows with each wish of one visitor."""

    lineup: Lineup
    _newest: dict[str, float] = field(default_factory=dict)
    _bookkeeping: threading.Lock = field(default_factory=threading.Lock)
    _machine: threading.Lock = field(default_factory=threading.Lock)

    def drawn(self, visitor: str, stamp: float, wish: Wish, lines: Sequence[int]) -> Iterator[News]:
        """News until all `lines`, numbers of players, are done; ends early where a newer wish has come.

        The cheapest lines come first. A wish that is outdated from the start gives none.
        """
        with self._bookkeeping:
            if not isinstance(stamp, int | float) or stamp < self._newest.get(visitor, stamp):
                return
            self._newest.pop(visitor, None)
            self._newest[visitor] = stamp  # the last of the dictionary
            while len(self._newest) > MOST_VISITORS:
                self._newest.pop(next(iter(self._newest)))
        gone = threading.Event()

        def check() -> None:
            if gone.is_set() or self._newest.get(visitor) != stamp:
                raise Outdated

        news: queue.Queue[News | None] = queue.Queue()
        work = _Work(self.lineup, wish, lines, check, news.put)
        threading.Thread(target=work.run, args=(self._machine,), daemon=True, name="draw").start()
        try:
            yield from _until_none(news, work)
        finally:
            gone.set()


def _until_none(news: "queue.Queue[News | None]", work: "_Work") -> Iterator[News]:
    said = ""
    while True:
        try:
            item = news.get(timeout=SECONDS_BETWEEN_NEWS)
        except queue.Empty:
            item = News(work.status)
        if item is None:
            return
        if item.line is not None or item.status != said:
            said = item.status
            yield item


@dataclass
class _Work:
    """A wish in work, in a thread of its own."""

    lineup: Lineup
    wish: Wish
    lines: Sequence[int]
    check: Callable[[], None]
    tell: Callable[[News | None], None]
    status: str = "waiting for another visitor's pictures"

    def run(self, machine: threading.Lock) -> None:
        try:
            while not machine.acquire(timeout=SECONDS_BETWEEN_NEWS):
                self.check()
            try:
                players = self.lineup.players
                order = sorted(self.lines, key=lambda k: self.wish.num_steps or players[k].num_steps)
                for line in order:
                    self.check()
                    news = self._line(line, players[line])
                    self.check()
                    self.tell(replace(news, is_last=line == order[-1]))
            finally:
                machine.release()
        except Outdated:
            pass
        finally:
            self.tell(None)

    def _line(self, line: int, player: Player) -> News:
        def on_step(k: int, n: int) -> None:
            self.status = f"{player.name}: step {k} of {n}"

        new = not self.lineup.is_loaded(player)
        self.status = f"{player.name}: loading" if new else f"{player.name}: drawing"
        try:
            strip = draw(self.lineup.denoiser(player), player, self.wish, self.check, on_step)
            notes = [strip.note, "the first time, with what is set up once" if new else ""]
            return News(self.status, line, replace(strip, note="; ".join(filter(None, notes))))
        except UserError as error:
            return News(self.status, line, problem=printable(error))
        except Outdated:
            raise
        except Exception as error:  # of a network or a sampler of somebody's own: a line on the page, not a trace
            problem = printable(f"{type(error).__name__}: {first_line(error)}")
            print(f"{player.directory}: {problem}", file=sys.stderr)
            return News(self.status, line, problem=f"this cannot be drawn ({problem})")
