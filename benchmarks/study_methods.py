"""Students of one teacher by several methods, for the same number of network passes: a table that decides.

    python benchmarks/study_methods.py outputs/demo/teacher/denoiser --budget 10500 --seeds 0 1 2 \\
        --rows "halving: method=halving" "EMA: method=halving distillation.ema_decay=0.99"

A row is a name and overrides of `distill.py experiment=study_methods`; `--common` has those of all rows, such as the
dataset and the network. {seed} and {runs} in them stand for the run's seed and the directory of runs, so that a row
can start from another's student. Of `steps.updates` and `steps.updates_last_two` only the proportion counts: both are
scaled to what the budget pays for, by the passes that an update is seen to take (an evaluation of a batch is one, an
update with gradients three).

Every student of 8, 4, 2 and 1 steps is measured by the features of a classifier of another seed and width than that of
`metrics=classifier`, beside its teacher's DDIM of many steps from the same noise. Runs come one at a time and in
processes of their own. Whatever is finished is not done again, so that the same command goes on after a stop; results
stand in <output>/results.json, .md, .png and .html after every run. results.json is enough to go on from: on another
machine, with the same teacher, what is in it is not run again.
"""

import argparse
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pdistill.bars import bar
from pdistill.commands.complaints import USER_ERRORS, one_line
from pdistill.commands.settings import Distill, conf, settings_of
from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_uint8
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.files import read_json, whole, write_json, write_text
from pdistill.generation import Draw, generate
from pdistill.metrics.classifier import train_classifier
from pdistill.metrics.distances import FrechetDistance, home_of_doubles, measures, moments
from pdistill.metrics.extractors import build, fingerprint_of, metric_name
from pdistill.metrics.reference import reference
from pdistill.processes import device_of
from pdistill.report import charts, page, plots
from pdistill.report.grids import nearest_neighbours
from pdistill.report.rounding import mean_and_spread, number
from pdistill.report.tables import filled, markdown, words
from pdistill.steps import Stage
from pdistill.training.cost import PassCount
from pdistill.training.distillation import DistillationModule
from pdistill.training.module import Recipe

DISTILL = Path(__file__).parents[1] / "distill.py"
EXTRACTOR_WIDTH = 48  # that of metrics=classifier has 32
AT_ONCE = 250  # images
STOPPED = (130, -2, -15)  # exit statuses of a run that was interrupted
ROWS = (
    "halving: method=halving",
    "tract: method=tract",
    "multistep_consistency: method=multistep_consistency",
    "parallel_decoding: method=parallel_decoding steps.plan=[32,8,4,2,1]",
)


@dataclass(frozen=True)
class Study:
    """What is run."""

    teacher: str
    rows: dict[str, str]
    """Name -> overrides."""
    common: list[str]
    """Overrides of all rows."""
    budget: float
    """Network passes of a run."""
    output: Path

    @property
    def runs(self) -> Path:
        return self.output / "runs"

    def overrides(self, name: str, seed: int) -> dict[str, str]:
        """Of one run, without its updates; what a row says comes before what all say."""
        text = self.rows[name].replace("{seed}", str(seed)).replace("{runs}", str(self.runs))
        found = {"experiment": "study_methods", "teacher": self.teacher}
        for word in [*self.common, *shlex.split(text)]:
            key, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"row {name!r}: {word!r} is no override: give key=value")
            found[key] = value
        return found | {"seed": str(seed), "output_root": str(self.runs), "name": f"{_plain(name)}-seed-{seed}"}

    def words(self, name: str, seed: int) -> list[str]:
        """The overrides of one run."""
        return affordable(self.overrides(name, seed), self.budget)

    def finished(self, name: str, seed: int, words: list[str]) -> Path | None:
        """The directory of one run, when it is there and finished; None if the run failed.

        Raises UserError where another run lies there.
        """
        directory = self.runs / self.overrides(name, seed)["name"]
        if not (directory / "summary.json").exists():
            print(f"\n{directory.name}: distill.py {' '.join(words)}", flush=True)
            if exit_status([sys.executable, str(DISTILL), *words]) != 0:
                return None
        elif words != read_json(directory / "run.json")["overrides"]:
            raise UserError(f"{directory} is a run of another row, budget or teacher: choose another --output")
        return directory


def exit_status(command: list[str]) -> int:
    """Of a process, which is stopped when this one is. Raises KeyboardInterrupt if either was interrupted."""
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # it writes a checkpoint
        process.wait()
        raise
    if status in STOPPED:
        raise KeyboardInterrupt
    return status


def portable(words: Sequence[str]) -> list[str]:
    """Of a run's overrides those that would be the same on another machine."""
    return [word for word in words if word.partition("=")[0] not in ("teacher", "start", "output_root")]


def _plain(name: str) -> str:
    """Of a directory."""
    return re.sub(r"[^\w.+-]+", "_", name)


def affordable(overrides: dict[str, str], budget: float) -> list[str]:
    """The overrides with as many updates as the budget pays for. Raises UserError where it pays for too few."""
    words = [f"{key}={value}" for key, value in overrides.items()]
    settings = composed(words)
    method = instantiate(settings.method)
    stages = method.stages(settings.steps, settings.distillation.max_teacher_steps)
    recipe = Recipe(settings.distillation, instantiate(settings.weighting))
    teacher = Denoiser.load(Path(overrides["teacher"]).expanduser())
    price = sum(stage.updates * passes_of_update(teacher, stage, recipe, method) for stage in stages)
    shares = {key: getattr(settings.steps, key) * budget / price for key in ("updates", "updates_last_two")}
    fewest = min(stage.updates for stage in stages)
    if fewest * budget < price:
        raise UserError(
            f"{overrides['name']}: --budget {budget:g} does not pay for an update of each stage: give at least "
            f"{price / fewest:.0f}"
        )
    return [*words, *(f"steps.{key}={max(1, int(updates))}" for key, updates in shares.items())]


def composed(words: list[str]) -> Distill:
    """The settings that distill.py makes of its overrides."""
    with initialize_config_dir(str(conf()), version_base="1.3"):
        return settings_of(compose("distill", words))


def passes_of_update(teacher: Denoiser, stage: Stage, recipe: Recipe, method: Any) -> float:
    """Network passes of one update, counted."""
    module = DistillationModule(teacher, stage, recipe, method)
    batch = {"image": torch.zeros(2, *teacher.image_shape), "label": torch.zeros(2, dtype=torch.long)}
    count = PassCount(module)
    module.losses(batch)
    count.close()
    return count.images / len(batch["image"])


@dataclass
class Measurement:
    """Students beside their teacher's images of many steps, by an extractor of their own."""

    teacher: Denoiser
    teacher_steps: int
    extractor: nn.Module
    data: ImageSet
    num_samples: int
    device: torch.device
    cache: Path

    @cached_property
    def real(self) -> tuple[Tensor, FrechetDistance]:
        """Features of the real images, and the distance to all of them."""
        found = reference(self.extractor, self.data, self.device)
        assert found.features is not None
        distance = FrechetDistance(found.mean, found.covariance).to(home_of_doubles(self.device))
        return found.features.to(self.device), distance

    @property
    def made_with(self) -> dict[str, Any]:
        """What must be equal for results to stand in one table."""
        return {
            "teacher_fingerprint": self.teacher.fingerprint,
            "teacher_steps": self.teacher_steps,
            "extractor_fingerprint": fingerprint_of(self.extractor),
            "reference_fingerprint": self.data.fingerprint,
            "num_samples": self.num_samples,
        }

    def images_of_teacher(self, seed: int) -> Tensor:
        """(N, C, H, W), drawn once and kept, batch by batch."""
        folder = self.cache / f"teacher-{self.teacher.fingerprint}-{self.teacher_steps}-steps-seed-{seed}"
        parts = []
        for batch in bar(self._batches(), f"teacher, {self.teacher_steps} steps, seed {seed}", unit="batch"):
            file = folder / f"{batch.start}-{batch.stop}.safetensors"
            if not file.exists():
                with whole(file) as temporary:
                    save_file({"images": self._drawn(self.teacher, self.teacher_steps, seed, batch)}, temporary)
            parts.append(load_file(file)["images"])
        return torch.cat(parts)

    def _batches(self) -> list[range]:
        return [range(k, min(k + AT_ONCE, self.num_samples)) for k in range(0, self.num_samples, AT_ONCE)]

    def _drawn(self, denoiser: Denoiser, num_steps: int, seed: int, batch: range) -> Tensor:
        draw = Draw(num_steps, seed, AT_ONCE)
        return torch.cat(list(generate(denoiser.to(self.device), batch, draw, self.device))).cpu()

    @torch.inference_mode()
    def of_images(self, images: Tensor) -> dict[str, Any]:
        """FID, KID, precision, recall of (N, C, H, W), and `nearest`: the mean rms distance to a real image."""
        real, distance = self.real
        parts = [part.to(self.device) for part in images.split(AT_ONCE)]
        features = torch.cat([self.extractor(to_uint8(part)).float() for part in parts])
        away = torch.cat([part - nearest_neighbours(part, self.data.images, k=1)[:, 0] for part in parts])
        nearest = float(away.square().mean((1, 2, 3)).sqrt().mean())
        return self._named(measures(features, real, distance, None, bootstrap=0)) | {"nearest": nearest}

    @torch.inference_mode()
    def of_halves(self) -> dict[str, Any]:
        """The floor: one half of the real images, or as many as there are samples, against the others."""
        real, _ = self.real
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        half = min(self.num_samples, len(real) // 2)
        few, others = real[order[:half]], real[order[half:]]
        return self._named(measures(few, others, FrechetDistance(*moments(others)), None, bootstrap=0))

    def _named(self, row: dict[str, float | None]) -> dict[str, Any]:
        kept = {"fid", "kid", "precision", "recall"} & row.keys()
        return {k if k in ("precision", "recall") else metric_name(k, self.extractor): row[k] for k in sorted(kept)}

    def of_student(self, denoiser: Denoiser, num_steps: int, seed: int) -> dict[str, Any]:
        """The same of a student, and `rms`, its distance to the teacher's images from the same noise, in [0, 2]."""
        images = torch.cat([self._drawn(denoiser, num_steps, seed, batch) for batch in self._batches()])
        rms = (images - self.images_of_teacher(seed)).square().mean().sqrt()
        return self.of_images(images) | {"rms": float(rms)}


class Results:
    """The file of what was measured."""

    def __init__(self, output: Path, measurement: Measurement) -> None:
        self.output, self.measurement = output, measurement
        self.fid = metric_name("fid", measurement.extractor)
        found = read_json(output / "results.json", None)
        if found is None:
            found = {"made_with": measurement.made_with, "halves": measurement.of_halves(), "teachers": {}, "rows": []}
        differing = [key for key, value in measurement.made_with.items() if found["made_with"].get(key) != value]
        if differing:
            raise UserError(f"{output / 'results.json'} has another {', '.join(differing)}: choose another --output")
        self.found = found

    def known(self, name: str, seed: int, words: list[str]) -> bool:
        """Whether the run of these overrides is measured, wherever that was done. Raises UserError for other ones."""
        of_run = [row for row in self.found["rows"] if (row["name"], row["seed"]) == (name, seed)]
        if any(row["overrides"] != portable(words) for row in of_run):
            file = self.output / "results.json"
            raise UserError(f"{file} has a run of another row or budget as {name!r}: choose another --output")
        return bool(of_run)

    def teacher(self, seed: int) -> dict[str, Any]:
        """What the teacher's own images measure, from this seed's noise."""
        if str(seed) not in self.found["teachers"]:
            of_images = self.measurement.of_images(self.measurement.images_of_teacher(seed))
            self.found["teachers"][str(seed)] = of_images
        return self.found["teachers"][str(seed)]

    def add(self, name: str, seed: int, run: Path, counts: Sequence[int]) -> None:
        """Measures the students of a run, at these step counts, and writes the tables."""
        overrides = portable(read_json(run / "run.json")["overrides"])
        stages, rows = [row for row in read_json(run / "summary.json") if row["stage"] != "teacher"], []
        cost = {k: _sum([row.get(k, 0) for row in stages]) for k in ("network_passes", "training_seconds")}
        for row in stages:
            if row["stage"] != f"steps-{row['num_steps']:04d}" or row["num_steps"] not in counts:
                continue
            denoiser = Denoiser.load(run / row["denoiser"])
            made = {"name": name, "seed": seed, "num_steps": row["num_steps"], "overrides": overrides}
            measured = self.measurement.of_student(denoiser, row["num_steps"], seed)
            measured["ratio"] = measured[self.fid] / self.teacher(seed)[self.fid]
            rows.append(made | {"denoiser_fingerprint": denoiser.fingerprint} | measured | cost)
        self.found["rows"] += rows
        self.write()

    def write(self) -> None:
        """results.json, results.md, results.png, and results.html, whose tables can be filtered."""
        write_json(self.output / "results.json", self.found)
        tables = self.tables()
        write_text(
            self.output / "results.md", "\n\n".join(["\n".join(markdown(t.headings, t.lines)) for t in tables]) + "\n"
        )
        curves: dict[str, dict[int, list[float]]] = {}
        for row in self.found["rows"]:
            curves.setdefault(row["name"], {}).setdefault(row["num_steps"], []).append(row["ratio"])
        plots.plot(curves, f"{self.fid}, student / teacher", self.output / "results.png")
        chart = charts.quality(curves, "student / teacher", page.EVALUATIONS)
        told = {"chart": chart, "chart_title": "Students over their teacher; lower is better", "tables": tables}
        page.render(self.output / "results.html", name=self.output.name, sentence=self.sentence(), runs=[], **told)

    def sentence(self) -> str:
        """Which row is the best at the fewest steps."""
        if not self.found["rows"]:
            return "Nothing is measured yet."
        fewest = min(row["num_steps"] for row in self.found["rows"])
        ratios: dict[str, list[float]] = {}
        for row in self.found["rows"]:
            ratios.setdefault(row["name"], []).extend([row["ratio"]] if row["num_steps"] == fewest else [])
        means = {name: statistics.mean(values) for name, values in ratios.items() if values}
        best = min(means, key=means.__getitem__)
        students, score = f"students of {fewest} step{'s' * (fewest > 1)}", mean_and_spread(ratios[best])
        ways = f"{len(means)} way{'s' * (len(means) > 1)} to make {students}"
        return f"Of {ways}, {best} has the lowest {self.fid}: {score} times its teacher's."

    def tables(self) -> list[page.Table]:
        """Over seeds, student / teacher at each step count; and every student by itself."""
        rows: list[dict[str, Any]] = self.found["rows"]
        counts = sorted({row["num_steps"] for row in rows}, reverse=True)
        names, lines = list(dict.fromkeys(row["name"] for row in rows)), []
        for name in names:
            of_name = [row for row in rows if row["name"] == name]
            runs = list({row["seed"]: row for row in of_name}.values())
            ratios = [mean_and_spread([row["ratio"] for row in of_name if row["num_steps"] == n]) for n in counts]
            lines.append([name, ", ".join(str(row["seed"]) for row in runs), *ratios, *_mean_cost(runs)])
        steps = [f"{n} step{'s' * (n > 1)}" for n in counts]
        headings = ["student / teacher", "seeds", *steps, "network passes", "seconds"]
        kid = metric_name("kid", self.measurement.extractor)
        keys = [self.fid, "ratio", kid, "precision", "recall", "rms", "nearest"]
        each = [(row["name"], str(row["seed"]), str(row["num_steps"]), row) for row in rows]
        many = str(self.measurement.teacher_steps)
        each += [("teacher", seed, many, row) for seed, row in self.found["teachers"].items()]
        each.append(("two halves of the real images", "", "", self.found["halves"]))
        students = [[*place, *(number(row.get(key)) for key in keys)] for *place, row in each]
        return [
            page.Table("Over seeds", headings, lines, names),
            page.Table("Every student", *filled(["images of", "seed", "steps", *keys], students)),
        ]


def _mean_cost(runs: list[dict[str, Any]]) -> list[str]:
    costs = [[row[key] for row in runs if row[key] is not None] for key in ("network_passes", "training_seconds")]
    return [words(statistics.mean(values), ".0f") if values else "" for values in costs]


def _sum(values: list[float | None]) -> float | None:
    """None where a part is not known."""
    return None if None in values else sum(filter(None, values))


def run(study: Study, seeds: Sequence[int], counts: Sequence[int], measurement: Measurement) -> None:
    """All rows, seed by seed. Raises UserError for a row that cannot be run, and, at the end, if one failed."""
    for made in (study.overrides(name, seeds[0]) for name in study.rows):
        if Path(made["teacher"]).expanduser().exists():  # else it is yet to be trained
            affordable(made, study.budget)
    results, failed = Results(study.output, measurement), []
    for seed in seeds:
        for name in study.rows:
            words = study.words(name, seed)
            if results.known(name, seed, words):
                continue
            directory = study.finished(name, seed, words)
            if directory is None:
                failed.append(f"{name}-seed-{seed}")
            else:
                results.add(name, seed, directory, counts)
    if results.found["rows"]:
        first = results.tables()[0]
        table = "\n".join(markdown(first.headings, first.lines))
        print(f"\n{table}\n\nall: {study.output / 'results.md'}, .html, .png and .json")
    if failed:
        raise UserError(f"{', '.join(failed)} failed, with the lines of error above; the others are finished")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a denoiser's directory")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help='"name: overrides", by default methods')
    parser.add_argument("--common", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of all rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budget", type=float, default=10_500, help="network passes of a run (default 10,500)")
    parser.add_argument("--counts", nargs="+", type=int, default=[8, 4, 2, 1], help="steps to measure at")
    parser.add_argument("--samples", type=int, default=2000, help="images to measure (default 2,000)")
    parser.add_argument("--teacher-steps", type=int, default=128, help="of the teacher's own images (default 128)")
    parser.add_argument("--extractor-seed", type=int, default=1, help="of the classifier that measures (default 1)")
    parser.add_argument("--extractor-updates", type=int, default=3000, help="at most (default 3,000)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... to measure on")
    parser.add_argument("--output", type=Path, default=Path("outputs", "study_methods"))
    options = parser.parse_args(arguments)
    named = [row.partition(":") for row in options.rows]
    if not all(colon and name.strip() and "=" in overrides for name, colon, overrides in named):
        parser.error('a row is "name: overrides", e.g. --rows "halving: method=halving"')
    options.rows = {name.strip(): overrides for name, _, overrides in named}
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        study = Study(options.teacher, options.rows, options.common, options.budget, options.output)
        teacher = Denoiser.load(Path(options.teacher).expanduser())
        first = study.overrides(next(iter(options.rows)), options.seeds[0])
        data = instantiate(composed([f"{key}={value}" for key, value in first.items()]).dataset)
        if not isinstance(data, ImageSet):
            raise UserError("dataset=none has no real images to measure against: give --common dataset=...")
        part = partial(train_classifier, seed=options.extractor_seed, width=EXTRACTOR_WIDTH)
        device = device_of(options.device)
        extractor = build(partial(part, max_updates=options.extractor_updates), data).to(device)
        how = (options.teacher_steps, extractor, data, options.samples, device, options.output)
        run(study, options.seeds, options.counts, Measurement(teacher, *how))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is finished")
    except USER_ERRORS as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
