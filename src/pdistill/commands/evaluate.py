"""FID, KID, Inception score, precision and recall of denoisers, with intervals and provenance: what evaluate.py does.

Images go from the sampler to the extractor in memory, and all metrics share one pass of features.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from pdistill import curve, report
from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_uint8
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.files import write_json
from pdistill.interop.diffusers import Pipeline, is_pipeline
from pdistill.metrics.distances import FrechetDistance, measures
from pdistill.metrics.reference import frechet_distance, generate, provenance, reference
from pdistill.report.grids import device_of, name_of
from pdistill.report.tables import REAL, cells, curves
from pdistill.sampling import samplers


@dataclass(frozen=True)
class Contender:
    """One row to measure; rows of one `label` are one curve."""

    label: str
    path: str
    sampler: str
    num_steps: int


def evaluate(cfg: DictConfig) -> Path:
    """Measures what `contenders` lists; returns the JSON file of rows.

    Rows that stand there with the same provenance are kept. Raises UserError before any work where the settings do
    not fit.
    """
    for key, least in {"batch_size": 1, "devices": 1, "bootstrap": 0, "metrics.num_samples": 2, "seed": 0}.items():
        value = OmegaConf.select(cfg, key)
        if cfg.metrics.extractor is not None and not (isinstance(value, int) and value >= least):
            raise UserError(f"{key}={value} must be a whole number, at least {least}")
    rows_to_measure = contenders(cfg)
    data = _reference_set(cfg)
    models = {c.path: _load(c.path) for c in rows_to_measure}
    for path, model in models.items():
        if data.image_shape != model.image_shape:
            raise UserError(
                f"denoiser={path} makes images of shape {model.image_shape} and {data.name} holds "
                f"{data.image_shape}: give the dataset that it was trained on"
            )
    strategy = "auto" if cfg.devices == 1 else "ddp"
    fabric = Fabric(accelerator=device_of(cfg.device).type, devices=cfg.devices, strategy=strategy)
    fabric.launch()
    file = Path("outputs/evaluations") / f"{cfg.name or _name(cfg)}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    fabric.barrier()  # all have read it before one writes
    evaluation = Evaluation(cfg, data, fabric)
    tasks = [(evaluation.provenance_of_real(), evaluation.floor)]
    tasks += [(evaluation.provenance_of(c), partial(evaluation.figures, models[c.path], c)) for c in rows_to_measure]
    for made_with, measure in tasks:
        if any(_same(row["provenance"], made_with) for row in rows):
            continue
        start = time.perf_counter()
        row = measure()
        rows.append(row | {"provenance": made_with, "seconds": time.perf_counter() - start})
        if fabric.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, rows)
    if fabric.is_global_zero:
        _write_table_and_curve(file, rows)
        if (Path(cfg.denoiser) / "summary.json").exists():
            report.write([Path(cfg.denoiser)], Path(cfg.denoiser) / "report.html")
    fabric.barrier()
    return file


def contenders(cfg: DictConfig) -> list[Contender]:
    """What is to be measured: a denoiser or a diffusers pipeline at `num_steps` by `samplers`; of a run directory each
    student at its own step count and the teacher, as far as `baselines` goes, at all of these.

    Raises UserError where that is nothing, or cannot be.
    """
    if cfg.denoiser is None:
        raise UserError("denoiser=<directory> is missing, e.g. denoiser=outputs/demo/steps-0004/denoiser")
    path = Path(cfg.denoiser)
    students = sorted(path.glob("steps-*/denoiser"))
    if students:
        own_steps = [int(student.parent.name.removeprefix("steps-")) for student in students]
        found = [Contender("distilled", str(p), "ddim", n) for p, n in zip(students, own_steps, strict=True)]
        teacher, default = path / "teacher" / "denoiser", own_steps
    else:
        made_for = None if is_pipeline(path) else Denoiser.load(path).num_steps
        default = [made_for] if made_for else []
        found, teacher = [], path.parent.parent / "teacher" / "denoiser"
    steps = [cfg.num_steps] if isinstance(cfg.num_steps, int) else list(cfg.num_steps or default)
    if not steps:
        raise UserError(f"denoiser={cfg.denoiser} is made for no step count of its own: give steps=[...]")
    if not all(isinstance(n, int) and n > 0 for n in steps):
        raise UserError(f"steps={steps} must be whole numbers, at least 1, e.g. steps=[1,2,4,8]")
    chosen = {}
    for key in ("samplers", "baselines"):
        names = cfg[key] or []
        chosen[key] = samplers() if names == "all" else [names] if isinstance(names, str) else list(names)
        if unknown := set(chosen[key]) - set(samplers()):
            raise UserError(f"{key}={','.join(sorted(unknown))} must be among {', '.join(samplers())}, or all")
    if is_pipeline(path):
        found += [Contender(f"{path.name}, own scheduler", str(path), "own", n) for n in steps]
    elif not students:
        own = "teacher" if path.parent.name == "teacher" else "denoiser"
        found += [Contender(f"{own}, {name}", str(path), name, n) for name in chosen["samplers"] for n in steps]
    if chosen["baselines"] and not teacher.exists():
        raise UserError(f"baselines={cfg.baselines} are samplers of the teacher, and there is none at {teacher}")
    found += [Contender(f"teacher, {name}", str(teacher), name, n) for name in chosen["baselines"] for n in steps]
    return list(dict.fromkeys(found))


class Evaluation:
    """The extractor, what it says of the reference, and how samples are measured against that."""

    def __init__(self, cfg: DictConfig, data: ImageSet, fabric: Fabric) -> None:
        if cfg.metrics.extractor is None:
            raise UserError("metrics=none measures nothing: use metrics=classifier or metrics=inception")
        self.cfg, self.data, self.fabric = cfg, data, fabric
        extractor: nn.Module = instantiate(cfg.metrics.extractor)(data)
        self.extractor = extractor.to(fabric.device)
        measured = reference(extractor, data, fabric.device)
        self.real = measured["features"]
        self.distance = frechet_distance(measured, fabric.device)
        if fabric.is_global_zero and cfg.metrics.num_samples <= extractor.num_features:
            print(
                f"warning: {cfg.metrics.num_samples} samples for {extractor.num_features} features: the covariance is "
                f"singular and FID far too high; the row of {REAL} says how high"
            )

    def provenance_of(self, contender: Contender) -> dict[str, object]:
        cfg, c = self.cfg, contender
        made_with = provenance(self.extractor, self.data, cfg.metrics.num_samples, cfg.seed, c.num_steps, c.sampler)
        return made_with | {"denoiser": c.path, "label": c.label, "intervals": self._intervals}

    def provenance_of_real(self) -> dict[str, object]:
        size = min(self.cfg.metrics.num_samples, len(self.real) // 2)
        made_with = provenance(self.extractor, self.data, size, self.cfg.seed, None, "two halves")
        return made_with | {"denoiser": None, "label": REAL, "intervals": self._intervals}

    @property
    def _intervals(self) -> dict[str, object]:
        return {"bootstrap": self.cfg.bootstrap, "extrapolate": self.cfg.extrapolate}

    @torch.inference_mode()
    def figures(self, model: "Denoiser | Pipeline", contender: Contender) -> dict[str, float | None]:
        """The metrics of samples, split over devices by index: the same samples in the same batches on any number."""
        fabric, size, total = self.fabric, self.cfg.batch_size, self.cfg.metrics.num_samples
        model.to(fabric.device)
        starts = range(0, total, size)

        def batches(rank: int) -> Iterator[Tensor]:
            mine = starts[rank :: fabric.world_size]
            title = f"{contender.label}, {contender.num_steps} steps"
            for start in tqdm(mine, title, unit="batch", leave=False, disable=rank > 0):
                settings = (
                    range(start, min(start + size, total)),
                    contender.num_steps,
                    self.cfg.seed,
                    size,
                    fabric.device,
                )
                if isinstance(model, Pipeline):
                    yield from model.generate(*settings)
                else:
                    yield from generate(model, *settings, sampler=contender.sampler)

        mine = [self._features(to_uint8(images)) for images in batches(fabric.global_rank)]
        return self._measures(torch.cat(_interleaved(mine)), self.real, self.distance)

    @torch.inference_mode()
    def floor(self) -> dict[str, float | None]:
        """The metrics between two halves of the real images, at the number of samples, or as near as they get.

        FID of finite samples is biased upwards: this much of it is not the sampler's fault.
        """
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(self.cfg.seed))
        size = self.provenance_of_real()["num_samples"]
        half, other = self.real[order[:size]], self.real[order[size:]]
        square = other.to(self.fabric.device, torch.float64)
        return self._measures(half, other, FrechetDistance(square.mean(0), torch.cov(square.T)))

    def _measures(self, fake: Tensor, real: Tensor, distance: FrechetDistance) -> dict[str, float | None]:
        """Under names that say the extractor: `fid`, `kid` and `is` are Inception's alone."""
        device, cfg = self.fabric.device, self.cfg
        logits, options = self.extractor.logits, (cfg.bootstrap, cfg.extrapolate)
        row = measures(fake.to(device), real.to(device), distance, logits, *options)
        suffix = "" if self.extractor.name == "inception" else f"_{self.extractor.name}"
        return {re.sub("^(fid|kid|is)", rf"\1{suffix}", key): value for key, value in row.items()}

    def _features(self, images: Tensor) -> Tensor:
        return self.extractor(images).float().cpu()


def _interleaved(mine: list[Tensor]) -> list[Tensor]:
    """Every rank's batches in the order of the samples, on every rank; ranks may have made none."""
    if not torch.distributed.is_initialized():
        return mine
    everyones: list[list[Tensor]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyones, mine)
    return [of_rank[i] for i in range(len(everyones[0])) for of_rank in everyones if i < len(of_rank)]


def _load(path: str) -> "Denoiser | Pipeline":
    return Pipeline.load(path) if is_pipeline(Path(path)) else Denoiser.load(path)


def _reference_set(cfg: DictConfig) -> ImageSet:
    """The dataset, or `num_reference` of its images, evenly spread."""
    data: ImageSet = instantiate(cfg.dataset)
    if cfg.num_reference is None:
        return data
    if not 2 <= cfg.num_reference <= len(data.images):
        raise UserError(
            f"num_reference={cfg.num_reference} must be 2 to {len(data.images)}, the images of {data.name}, or null "
            f"for all of them"
        )
    index = torch.from_numpy(np.linspace(0, len(data.images) - 1, cfg.num_reference).round().astype(np.int64))
    labels = None if data.labels is None else data.labels[index]
    return ImageSet(f"{data.name}, {cfg.num_reference} images", data.images[index], labels, data.flips)


def _name(cfg: DictConfig) -> str:
    path = Path(cfg.denoiser)
    return name_of(path) if path.name == "denoiser" else path.resolve().name


def _same(ours: dict, theirs: dict) -> bool:
    return {k: v for k, v in ours.items() if k != "version"} == {k: v for k, v in theirs.items() if k != "version"}


def _write_table_and_curve(file: Path, rows: list[dict]) -> None:
    headings, lines, notes = cells(rows)
    table = ["| " + " | ".join(row) + " |" for row in (headings, ["---", *["---:"] * (len(headings) - 1)], *lines)]
    file.with_suffix(".md").write_text("\n".join([*table, "", *notes]).rstrip() + "\n")
    metric, found = curves(rows)
    if any(len(points) > 1 for points in found.values()) or len(found) > 1:
        curve.plot(found, metric, file.with_suffix(".png"))


def show(file: Path) -> None:
    """Prints the rows of an evaluation as a table."""
    headings, lines, notes = cells(json.loads(file.read_text()))
    table = Table(title=file.stem)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(f"figures with their provenance: {file} and .md", soft_wrap=True)
