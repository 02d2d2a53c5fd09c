"""Which denoisers are shown together: of a run its teacher and students, or a single one."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pdistill.checks import is_count
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.faults import in_words
from pdistill.files import read_json
from pdistill.report.runs import check, is_row, rows_of
from pdistill.report.tables import title

STEPS_OF_A_TEACHER = 32  # where nothing says how many it is sampled in


@dataclass(frozen=True)
class Player:
    """A line of the page: a denoiser, and the step count that it is sampled in unless another is asked for."""

    name: str
    directory: Path
    num_steps: int


@dataclass
class Lineup:
    """The denoisers of a page. Each is loaded when something is first asked of it, and kept."""

    name: str
    players: list[Player]
    device: torch.device
    _loaded: dict[Path, Denoiser] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def denoiser(self, player: Player) -> Denoiser:
        """Raises UserError for a directory that cannot be read, or where the memory does not suffice."""
        with self._lock:
            if player.directory not in self._loaded:
                with in_words(f"loading {player.directory}", "show fewer denoisers, or start again with --device cpu"):
                    self._loaded[player.directory] = Denoiser.load(player.directory).to(self.device)
            return self._loaded[player.directory]

    def is_loaded(self, player: Player) -> bool:
        """Whether it is in memory."""
        return player.directory in self._loaded

    @property
    def taught_guidance(self) -> list[tuple[float, float]]:
        """The ranges of guidance that denoisers were taught, as their directories say; nothing is loaded."""
        found = [_description(player.directory).get("guidance") for player in self.players]
        return [(float(low), float(high)) for low, high in filter(None, found)]


def lineup_of(path: Path, device: torch.device) -> Lineup:
    """Of a run directory, a stage's or a denoiser's. Raises UserError for another, and for a run without a finished
    stage."""
    if (path / "denoiser" / "denoiser.json").is_file():  # of a stage
        path = path / "denoiser"
    if (path / "denoiser.json").is_file():
        return Lineup(str(path), _alone(path), device)
    if not (path / "config.yaml").is_file():
        what = "is neither a run nor a denoiser" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: give a run, e.g. outputs/demo, or a denoiser's directory in it")
    check(path)
    rows = rows_of(path)
    own = {row["stage"] for row in rows}
    players = []
    for row in rows:
        directory = path / row["stage"] / "denoiser"
        counts = _counts(directory)
        if not counts:
            players.append(Player(title(row), directory, row["num_steps"]))
        elif any(f"steps-{n:04d}" not in own for n in counts):  # else its students are lines of their own
            players += [Player(_words(n), directory, n) for n in counts]
    return Lineup(str(path), players, device)


def _alone(directory: Path) -> list[Player]:
    if counts := _counts(directory):
        return [Player(_words(n), directory, n) for n in counts]
    num_steps: Any = _description(directory).get("num_steps")
    if is_count(num_steps):
        return [Player(_words(num_steps), directory, num_steps)]
    row = read_json(directory.parent / "metrics.json", {})  # of the stage whose teacher it is
    if is_row(row) and row["stage"] == directory.resolve().parent.name:
        return [Player(title(row), directory, row["num_steps"])]
    return [Player(f"teacher, {_words(STEPS_OF_A_TEACHER)}", directory, STEPS_OF_A_TEACHER)]


def _words(num_steps: int) -> str:
    return title({"stage": f"steps-{num_steps:04d}", "num_steps": num_steps})


def _description(directory: Path) -> dict[str, Any]:
    """What `denoiser.json` says; empty where it is none, which loading tells of."""
    content = read_json(directory / "denoiser.json", {}, cure="copy or train the denoiser again")
    return content if isinstance(content, dict) else {}


def _counts(directory: Path) -> list[int]:
    """The step counts of a denoiser that knows several; else empty."""
    part = _description(directory).get("parameterization")
    counts = part.get("counts") if isinstance(part, dict) else None
    return [n for n in counts if is_count(n)] if isinstance(counts, list) else []
