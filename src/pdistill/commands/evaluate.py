"""`pdistill evaluate`: FID, KID, Inception score, precision and recall of denoisers, with intervals and provenance.

Images go from the sampler to the extractor in memory, and all metrics share one pass of features. A row is written as
soon as it is measured, to <output_root>/evaluations/, beside what stands there; a table and a curve follow.
"""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from pdistill.commands import launching
from pdistill.commands.contenders import Contender, Model, contenders, load, made, place_of, reference_set, run_of
from pdistill.commands.sample import name_of
from pdistill.commands.settings import Evaluate, settings_of
from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_uint8
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line, printable
from pdistill.files import locked, read_json, write_json, write_text
from pdistill.generation import Draw, generate
from pdistill.interop.diffusers import Pipeline
from pdistill.metrics.classifier import Classifier, class_accuracy
from pdistill.metrics.distances import FrechetDistance, home_of_doubles, measures, moments
from pdistill.metrics.extractors import build, metric_name
from pdistill.metrics.provenance import (
    Provenance,
    are_measured,
    current,
    drawn_by,
    guided_by,
    is_stale,
    measured_with,
    replaces,
    same,
)
from pdistill.metrics.reference import REFERENCE_FEATURES, chosen, reference
from pdistill.metrics.shares import in_order, leads, my_batches, together
from pdistill.processes import device_of, is_main, launched, of_main, remember_started
from pdistill.report import plots
from pdistill.report.tables import REAL, cells, curves, plain, terminal

Row = dict[str, Any]


def main(cfg: DictConfig) -> None:
    """Measures, and prints the table."""
    file = evaluate(settings_of(cfg))
    if is_main():
        show(file)


def evaluate(settings: Evaluate) -> Path:
    """Measures what `contenders` lists; returns the JSON file of rows.

    Rows that stand there of the same weights, measured alike, are kept. Raises UserError before any work where the
    settings do not fit.
    """
    if settings.metrics.extractor is None:
        raise UserError("metrics=none measures nothing: use metrics=classifier or metrics=inception")
    device = device_of(settings.device)
    loaded = functools.cache(load)
    to_measure = contenders(settings, loaded)
    models = {c.path: loaded(c.path) for c in to_measure}
    shapes = {model.pixel_shape for model in models.values()}
    if len(shapes) > 1:
        raise UserError(f"denoiser={settings.denoiser} holds denoisers of images of several shapes: {sorted(shapes)}")
    data = reference_set(settings, shapes.pop())
    device = _start_processes(settings, device)
    rows = Rows(Path(settings.output_root).expanduser() / "evaluations" / f"{settings.name or _name(settings)}.json")
    evaluation = Evaluation(settings, data, device)
    for made_with, measure in evaluation.tasks(to_measure, models):
        if of_main(rows.holds(made_with) if is_main() else None):
            continue
        start = time.perf_counter()
        row = measure() | {"provenance": made_with, "seconds": time.perf_counter() - start}
        if is_main():
            rows.add(row)
    if is_main():
        rows.write_table_and_curve()
        _write_report(place_of(settings))
    return rows.file


def _start_processes(settings: Evaluate, device: torch.device) -> torch.device:
    """One process for each of several devices, on all nodes that a launcher was given; returns this one's device."""
    there = launched()
    nodes = there.nodes if there else 1
    here, rest = divmod(settings.devices, nodes)
    wanted = (1, settings.devices) if rest else (nodes, here)
    launching.check_counts(*wanted, f"devices={settings.devices}")
    if settings.devices == 1:
        return device
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"devices={settings.devices}: this machine has {torch.cuda.device_count()}")
    from lightning import Fabric

    try:
        fabric = Fabric(accelerator=device.type, devices=here, num_nodes=nodes, strategy="ddp")
        fabric.launch()
        remember_started(fabric.strategy.launcher)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"devices={settings.devices} cannot be started with device={settings.device} ({first_line(error)})"
        ) from error
    return fabric.device


def _name(settings: Evaluate) -> str:
    path = place_of(settings)
    return name_of(path) if path.name == "denoiser" else path.resolve().name


def _write_report(path: Path) -> None:
    """The run's page, with what was measured now."""
    if (path / "summary.json").exists() and run_of(path) == path:
        from pdistill.report import page

        page.write([path], path / "report.html")


class Evaluation:
    """The extractor, what it says of the reference, and how samples are measured against that."""

    def __init__(self, settings: Evaluate, data: ImageSet, device: torch.device) -> None:
        self.settings, self.data, self.device = settings, data, device
        self.extractor = build(made(settings.metrics.extractor), data, device).to(device)
        measured = reference(self.extractor, data, device)
        self.features = measured.features
        self.distance = FrechetDistance(measured.mean, measured.covariance).to(home_of_doubles(device))
        if is_main() and settings.metrics.num_samples <= len(measured.mean):
            print(
                f"warning: {settings.metrics.num_samples} samples for {len(measured.mean)} features: the covariance is "
                f"singular and FID far too high; the row of {REAL} says how high"
            )

    def tasks(self, rows: list[Contender], models: dict[str, Model]) -> list[tuple[Provenance, Callable[[], Row]]]:
        """What each row is measured with, and how; first the floor, where there are images for two halves of it."""
        fingerprints = {path: model.fingerprint for path, model in models.items()}
        found: list[tuple[Provenance, Callable[[], Row]]] = []
        if self._half > 1:
            judged = any(self._asked(model) is not None for model in models.values())
            found.append((self._provenance_of_real(), functools.partial(self.floor, judged)))
        for c in rows:
            model = models[c.path]
            clip = model.clip if isinstance(model, Pipeline) else self._draw(c).clip and model.clips
            made_with = self._shared(self.settings.metrics.num_samples)
            made_with |= drawn_by(fingerprints[c.path], c.sampler, c.num_steps, clip)
            made_with |= {"denoiser": c.path, "label": c.label} | guided_by(model, c.num_steps, c.guidance)
            found.append((made_with, functools.partial(self.metrics, model, c)))
        return found

    def _real(self) -> Tensor:
        """Features of real images (N, num_features), on the process that leads."""
        assert self.features is not None
        return self.features

    @property
    def _half(self) -> int:
        """How many real images are measured against others."""
        return min(self.settings.metrics.num_samples, min(len(self.data.images), REFERENCE_FEATURES) // 2)

    def _provenance_of_real(self) -> Provenance:
        made_with = self._shared(self._half) | drawn_by(None, "two halves", None, None)
        return made_with | {"denoiser": None, "label": REAL}

    def _shared(self, num_samples: int) -> Provenance:
        made_with = measured_with(self.extractor, self.data, num_samples, self.settings.seed, self.device)
        return made_with | {
            "intervals": {"bootstrap": self.settings.bootstrap, "extrapolate": self.settings.extrapolate}
        }

    def _draw(self, contender: Contender) -> Draw:
        sampler = "ddim" if contender.sampler == "own" else contender.sampler
        settings = self.settings
        return Draw(contender.num_steps, settings.seed, settings.batch_size, sampler, guidance=contender.guidance)

    def metrics(self, model: Model, contender: Contender) -> Row:
        """The metrics of samples, shared among processes: the same samples in the same batches for any number."""
        model.to(self.device)
        features = in_order(together(lambda: self._features(model, contender)))
        model.to("cpu")
        asked = self._asked(model)
        return self._on_main(lambda: self._measures(torch.cat(features), self._real(), self.distance, asked))

    @torch.inference_mode()
    def _features(self, model: Model, contender: Contender) -> list[Tensor]:
        """Of this process's batches."""
        draw, found = self._draw(contender), []
        title = f"{contender.label}, {contender.num_steps} step{'s' * (contender.num_steps > 1)}"
        for batch in my_batches(self.settings.metrics.num_samples, draw.batch_size, title):
            drawn = model.generate if isinstance(model, Pipeline) else functools.partial(generate, model)
            found += [self.extractor(to_uint8(images)).float().cpu() for images in drawn(batch, draw, self.device)]
        return found

    def _asked(self, model: Model) -> Tensor | None:
        """The classes (num_samples,) of the samples, all in turn; None where the extractor does not know just these."""
        classes = model.num_classes if isinstance(model, Denoiser) else None
        if classes is None or not isinstance(self.extractor, Classifier) or self.extractor.num_classes != classes:
            return None
        return torch.arange(self.settings.metrics.num_samples) % classes

    def floor(self, judged: bool = False) -> Row:
        """The metrics between two halves of the real images, at the number of samples, or as near as they get.

        FID of finite samples is biased upwards: this much of it is not the sampler's fault. `judged`: also how often
        the classifier sees the real images' own class.
        """

        def between_halves() -> Row:
            real = self._real()
            order = torch.randperm(len(real), generator=torch.Generator().manual_seed(self.settings.seed))
            half, other = real[order[: self._half]], real[order[self._half :]]
            distance = FrechetDistance(*moments(other.to(self.device)))
            labels = self.data.labels if judged else None
            own = None if labels is None else labels[chosen(self.data)][order[: self._half]]
            return self._measures(half, other, distance, own)

        return self._on_main(between_halves)

    def _on_main(self, measure: Callable[[], Row]) -> Row:
        """The features are there on one process; its errors are all processes'."""
        return of_main(together(lambda: measure() if leads() else None))

    @torch.inference_mode()
    def _measures(self, fake: Tensor, real: Tensor, distance: FrechetDistance, labels: Tensor | None = None) -> Row:
        """Under names that say the extractor: `fid`, `kid` and `is` are Inception's alone. `labels` are of `fake`."""
        settings, logits = self.settings, getattr(self.extractor, "logits", None)
        fake, real = fake.to(self.device), real.to(self.device)
        row = measures(fake, real, distance, logits, settings.bootstrap, settings.extrapolate)
        if labels is not None and logits is not None:
            row |= class_accuracy(logits(fake), labels)
        named = {metric: metric_name(metric, self.extractor) for metric in ("fid", "kid", "is")}
        return {re.sub("^(fid|kid|is)(?=_|$)", lambda m: named[m[0]], key): value for key, value in row.items()}


class Rows:
    """The file of rows, to which several processes may add at the same time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lock = file.with_name(f".{file.name}.lock")
        if is_main():
            with locked(self.lock):
                rows = self.read()
                if stale := [row for row in rows if is_stale(row)]:
                    write_json(file, [row for row in rows if row not in stale])

    def read(self) -> list[Row]:
        """Raises UserError for a file that is damaged."""
        rows = read_json(self.file, [])
        if not are_measured(rows):
            raise UserError(f"{self.file} holds no rows of metrics: move it away, or give another name=...")
        return rows

    def holds(self, made_with: Provenance) -> bool:
        """Whether the same measurement stands there."""
        return any(same(row["provenance"], made_with) for row in self.read())

    def add(self, row: Row) -> None:
        """Puts a row beside those that are there now, in the place of what it replaces."""
        with locked(self.lock):
            rows = [old for old in self.read() if not replaces(row["provenance"], old["provenance"])]
            # Version 0.1.0's come last: others are compared with the first row.
            write_json(self.file, sorted([*rows, row], key=lambda row: "device" not in row["provenance"]))

    def write_table_and_curve(self) -> None:
        """<name>.md and, where there is more than a point, <name>.png."""
        with locked(self.lock):
            rows = current(self.read())
            headings, lines, notes = cells(rows)
            rule = ["---", *["---:"] * (len(headings) - 1)]
            table = ["| " + " | ".join(map(plain, row)) + " |" for row in (headings, rule, *lines)]
            write_text(self.file.with_suffix(".md"), "\n".join([*table, "", *map(plain, notes)]).rstrip() + "\n")
            metric, found = curves(rows)
            if metric and (any(len(points) > 1 for points in found.values()) or len(found) > 1):
                plots.plot(found, metric, self.file.with_suffix(".png"))
            else:
                self.file.with_suffix(".png").unlink(missing_ok=True)


def show(file: Path) -> None:
    """Prints the rows of an evaluation as a table."""
    headings, lines, notes = cells(current(Rows(file).read()))
    console = Console()
    console.width = max(console.width, 140)
    console.print(terminal(headings, lines, title=file.stem))
    for note in [*notes, f"metrics with their provenance: {file} and .md"]:
        console.print(printable(note), soft_wrap=True, markup=False)
