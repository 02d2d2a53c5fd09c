"""What benchmarks/gpu.py keeps: items, their results in results.json, and the tables that are made of them."""

import math
import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdistill.errors import UserError
from pdistill.files import read_json, write_json, write_text
from pdistill.report.tables import markdown, words

Items = dict[str, dict[str, Any]]

# Mean over all updates of |loss - loss of float32| / loss of float32.
TOLERANCES = {"float32-again": 1e-3, "compile": 1e-3, "ddp": 1e-3, "bf16": 3e-2}
FIRST = 10  # updates, before differences have grown


class OverTime(BaseException):
    """An item took longer than it may. Not for `except Exception` to catch."""


@dataclass(frozen=True)
class Item:
    """A unit of work, whose result is kept under its name."""

    name: str
    seconds: float
    """What it may take: it is begun where so much is left, and given up after that."""
    work: Callable[[], Any]
    """Gives what is kept, as JSON."""
    needs: tuple[str, ...] = ()
    """Items that come before it."""
    goes_on: bool = False
    """It minds the limit itself, and gives None where it has to go on in the next call."""


@dataclass
class Results:
    """results.json: the items that are done, each with its seconds and its machine."""

    output: Path
    rehearsed: bool
    items: Items

    @classmethod
    def read(cls, output: Path, earlier: Path | None, rehearsed: bool) -> "Results":
        """What stands in `output`, and, of other items, in `earlier`. Raises UserError for results of another kind."""
        found: Items = {}
        for place in filter(None, (earlier, output)):
            content = read_json(place / "results.json", {"rehearsed": rehearsed, "items": {}})
            if not isinstance(content, dict) or content.get("rehearsed") != rehearsed:
                raise UserError(f"{place}/results.json is of another kind (rehearsed or not): choose another --output")
            found |= content["items"]
        return cls(output, rehearsed, found)

    def value(self, name: str) -> Any:
        """Of an item that was measured; None where it was not, or failed."""
        return self.items.get(name, {}).get("result")

    def keep(self, name: str, kept: dict[str, Any]) -> None:
        """Writes an item, and the tables."""
        self.items[name] = kept
        write_json(self.output / "results.json", {"rehearsed": self.rehearsed, "items": self.items})
        write_text(self.output / "results.md", page(self.items, self.rehearsed))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OverTime inside the block after so long."""

    def over(number: int, frame: object) -> None:
        raise OverTime(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- tables


def page(items: Items, rehearsed: bool) -> str:
    """All tables in Markdown; an item that failed is listed, one that was not run is absent."""
    parts = ["# On a GPU" + (": a rehearsal on a CPU, whose numbers mean nothing" if rehearsed else "")]
    machines = {tuple(str(item[key]) for key in ("device", "torch", "cuda", "version")) for item in items.values()}
    parts += [f"{device}, torch {torch}, CUDA {cuda}, pdistill {version}" for device, torch, cuda, version in machines]
    for title, lines in {"Speed": _speed(items), "Sampling": _sampling(items), "Parity": _parity(items)}.items():
        parts += [f"## {title}", "\n".join(lines)] if lines else []
    parts += _quality(items)
    failed = [f"- {name}: {item['error']}" for name, item in items.items() if "error" in item]
    parts += ["## Failed", "\n".join(failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def _of(items: Items, group: str) -> dict[str, Any]:
    """Name without its group -> result, of what was measured."""
    found = {name.removeprefix(f"{group}/"): item for name, item in items.items() if name.startswith(f"{group}/")}
    return {name: item["result"] for name, item in found.items() if "result" in item}


def _speed(items: Items) -> list[str]:
    """A line for each batch size and way to compute."""
    lines, rates = [], []
    for name, found in _of(items, "speed").items():
        teacher, student, bare = (found[key] for key in ("teacher", "distillation", "bare"))
        cells = [str(found["batch"]), name.partition("/")[2].replace("-", ", ")]
        for side in (teacher, student):
            milliseconds = side.get("error") or words(1000 * side["seconds"], ".1f")
            cells += [milliseconds, words(side.get("images_per_second"), ".0f")]
            cells += [words(100 * side.get("utilisation", math.nan), ".1f"), words(side.get("peak_gib"), ".2f")]
        ratios = [
            a.get("seconds", math.nan) / b.get("seconds", math.nan) for a, b in ((student, teacher), (teacher, bare))
        ]
        lines.append([*cells, *(words(ratio, ".3f") for ratio in ratios)])
        rates.append(found["matmul_flops"])
    if not lines:
        return []
    of_side = ["ms", "images/s", "MFU, %", "peak GiB"]
    headings = ["batch", "computed in", *(f"{side}: {what}" for side in ("teacher", "student") for what in of_side)]
    passed = next(iter(_of(items, "speed").values()))["flops_of_a_pass"]
    note = (
        f"MFU: FLOPs of the network ({passed / 1e9:.2f} GFLOP for a forward pass of an image; an update of the teacher "
        f"takes three passes, of a student five) over the rate of a bf16 matrix product, measured before each row "
        f"({min(rates) / 1e12:.3g} to {max(rates) / 1e12:.3g} TFLOP/s). The last column: the teacher's update of a "
        f"run over that of a bare loop."
    )
    return [*markdown([*headings, "student / teacher", "framework / bare loop"], lines), "", note]


def _sampling(items: Items) -> list[str]:
    lines = [
        [name, steps, words(row["ours"], ".0f"), words(row["diffusers"], ".0f"), words(row["ours"] / row["diffusers"])]
        for name, found in _of(items, "sampling").items()
        for steps, row in sorted(found.items(), key=lambda pair: int(pair[0]))
    ]
    return markdown(["computed in", "steps", "images/s", "images/s of diffusers", "ratio"], lines) if lines else []


def difference(losses: list[float], exact: list[float]) -> tuple[float, float]:
    """Relative, to the losses of float32: the mean over all updates, and the largest of the first."""
    relative = [abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True)]
    return statistics.mean(relative), max(relative[:FIRST])


def _parity(items: Items) -> list[str]:
    found = _of(items, "parity")
    if "float32" not in found:
        return []
    exact, lines = found["float32"]["losses"], []
    for name, tolerance in TOLERANCES.items():
        if name in found:
            mean, first = difference(found[name]["losses"], exact)
            verdict = "yes" if mean <= tolerance else "no"
            lines.append([name, words(mean, ".2g"), words(first, ".2g"), words(tolerance, ".2g"), verdict])
    note = f"Losses of {len(exact)} updates of a teacher, relative to those of float32: {found['float32']['data']}."
    headings = ["against float32", "mean", f"largest of the first {FIRST}", "tolerance of the mean", "within"]
    return [*markdown(headings, lines), "", note]


def _quality(items: Items) -> list[str]:
    found, parts = _of(items, "quality"), []
    if training := found.get("training"):
        keys = {"training_seconds": ".0f", "training_images": ".0f", "joules": ".0f", "seconds_per_image": ".3g"}
        lines = [
            [row["stage"], *(words(row.get(key), spec) for key, spec in keys.items())] for row in training["summary"]
        ]
        parts += ["## Quality", f"`{' '.join(training['command'])}`"]
        parts.append("\n".join(markdown(["stage", *(key.replace("_", " ") for key in keys)], lines)))
    for name, result in found.items():
        if name.startswith("fid-"):
            parts += [f"`{' '.join(result['command'])}`", result["table"].rstrip()]
    return parts
