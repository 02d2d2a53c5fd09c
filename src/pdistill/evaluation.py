"""FID, KID, Inception score, precision and recall of a denoiser, with intervals and provenance.

The metrics are torch-fidelity's, on features that are computed once for all of them; images go from the sampler to the
extractor in memory.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm import tqdm

from pdistill.batches import to_uint8
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser, write_json
from pdistill.errors import UserError
from pdistill.metrics import fid_name, generate, provenance
from pdistill.pictures import device_of, name_of
from pdistill.sampling import samplers

KID_SUBSET = 1000
PRC_IMAGES = 10_000  # of either side at most: precision and recall compare every pair


def evaluate(cfg: DictConfig) -> Path:
    """Measures `cfg.denoiser` at `cfg.num_steps` with `cfg.samplers`; returns the JSON file of rows.

    Rows that stand there with the same provenance are kept. Raises UserError before any work where the settings do
    not fit.
    """
    if cfg.denoiser is None:
        raise UserError("denoiser=<directory> is missing, e.g. denoiser=outputs/demo/steps-0004/denoiser")
    denoiser = Denoiser.load(cfg.denoiser)
    asked = cfg.num_steps or filter(None, [denoiser.num_steps])
    steps = [asked] if isinstance(asked, int) else list(asked)
    _check(cfg, denoiser, steps)
    data = instantiate(cfg.dataset)
    if data.image_shape != denoiser.image_shape:
        raise UserError(
            f"denoiser={cfg.denoiser} makes images of shape {denoiser.image_shape} and {data.name} holds "
            f"{data.image_shape}: give the dataset that it was trained on"
        )
    device = device_of(cfg.device)
    extractor = instantiate(cfg.metrics.extractor)(data).to(device)
    if cfg.metrics.num_samples <= extractor.num_features:
        print(
            f"warning: {cfg.metrics.num_samples} samples for {extractor.num_features} features: the covariance is "
            f"singular and FID far too high; the last line says how high for real images"
        )
    file = Path("outputs/evaluations") / f"{cfg.name or name_of(Path(cfg.denoiser))}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    real = features_of(extractor, data.images.split(cfg.batch_size), device)
    if not any(_same(row["provenance"], _of_real(cfg, extractor, data)) for row in rows):
        rows.append(floor(real, extractor, data, cfg))
    for sampler in cfg.samplers:
        for num_steps in steps:
            made_with = provenance(extractor, data, cfg.metrics.num_samples, cfg.seed, num_steps, sampler)
            made_with |= {"denoiser": str(cfg.denoiser)}
            if any(_same(row["provenance"], made_with) for row in rows):
                continue
            start = time.perf_counter()
            options = {"batch_size": cfg.batch_size, "device": device, "sampler": sampler}
            batches = generate(denoiser.to(device), range(cfg.metrics.num_samples), num_steps, cfg.seed, **options)
            total = -(-cfg.metrics.num_samples // cfg.batch_size)
            bar = tqdm(batches, f"{sampler}, {num_steps} steps", total, unit="batch", leave=False)
            fake = features_of(extractor, map(to_uint8, bar), device)
            row = measures(fake, real, extractor, cfg.bootstrap)
            rows.append(row | {"provenance": made_with, "seconds": time.perf_counter() - start})
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, rows)
    return file


def _check(cfg: DictConfig, denoiser: Denoiser, steps: list) -> None:
    if not steps:
        raise UserError(f"denoiser={cfg.denoiser} is a teacher, made for no step count of its own: give steps=[...]")
    if not all(isinstance(n, int) and n > 0 for n in steps):
        raise UserError(f"steps={steps} must be whole numbers, at least 1, e.g. steps=[1,2,4,8]")
    if unknown := set(cfg.samplers) - set(samplers()):
        raise UserError(f"samplers={','.join(sorted(unknown))} must be among {', '.join(samplers())}")
    if cfg.metrics.extractor is None:
        raise UserError("metrics=none measures nothing: use metrics=classifier or metrics=inception")


def _same(ours: dict, theirs: dict) -> bool:
    return {k: v for k, v in ours.items() if k != "version"} == {k: v for k, v in theirs.items() if k != "version"}


@torch.inference_mode()
def features_of(extractor: nn.Module, batches, device: torch.device | str) -> Tensor:
    """uint8 batches (B, C, H, W) -> float32 features (N, num_features) on the CPU."""
    return torch.cat([extractor(images.to(device)).float().cpu() for images in batches])


def fid(a: Tensor, b: Tensor) -> float:
    """Between two sets of features, (N, num_features) and (M, num_features)."""
    statistics = (fid_features_to_statistics(features.double()) for features in (a, b))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def measures(fake: Tensor, real: Tensor, extractor: nn.Module, bootstrap: int) -> dict[str, float]:
    """The metrics of features `fake` against `real`; `<fid>_std` is FID's over resampled fakes.

    Raises UserError where features are not finite, or all the same.
    """
    if not fake.isfinite().all() or (len(fake) > 1 and fake.std(0).max() == 0):
        raise UserError("the samples are not finite or all alike: nothing to measure. Was the denoiser trained?")
    name, size = fid_name(extractor), min(KID_SUBSET, len(fake), len(real))
    random = torch.Generator().manual_seed(0)
    again = [fid(fake[torch.randint(len(fake), (len(fake),), generator=random)], real) for _ in range(bootstrap)]
    row = {name: fid(fake, real), f"{name}_std": float(np.std(again)) if bootstrap else None}
    kid = kid_features_to_metric(fake, real, kid_subset_size=size, verbose=False)
    suffix = name.removeprefix("fid")
    row |= {f"kid{suffix}": kid["kernel_inception_distance_mean"]}
    row |= {f"kid{suffix}_std": kid["kernel_inception_distance_std"]}
    prc = prc_features_to_metric(fake[:PRC_IMAGES], real[:PRC_IMAGES], verbose=False)
    row |= {k: float(prc[k]) for k in ("precision", "recall")}
    if hasattr(extractor, "logits"):
        with torch.inference_mode():
            score = isc_features_to_metric(extractor.cpu().logits(fake))
        row |= {f"is{suffix}": score["inception_score_mean"], f"is{suffix}_std": score["inception_score_std"]}
    return row


def _of_real(cfg: DictConfig, extractor: nn.Module, data: ImageSet) -> dict:
    size = min(cfg.metrics.num_samples, len(data.images) // 2)
    return provenance(extractor, data, size, cfg.seed, None, "real halves")


def floor(real: Tensor, extractor: nn.Module, data: ImageSet, cfg: DictConfig) -> dict:
    """What the metrics are between two halves of the real images, at the number of samples, or as near as they get.

    FID of finite samples is biased upwards: this much of it is not the sampler's fault.
    """
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(cfg.seed))
    made_with = _of_real(cfg, extractor, data)
    half, other = real[order[: made_with["num_samples"]]], real[order[made_with["num_samples"] :]]
    return measures(half, other, extractor, cfg.bootstrap) | {"provenance": made_with, "seconds": None}


def show(file: Path) -> None:
    """Prints the rows of an evaluation as a table."""
    rows = json.loads(file.read_text())
    metrics = [k for k in rows[0] if k not in ("provenance", "seconds") and not k.endswith("_std")]
    table = Table(title=file.stem)
    for heading in ("sampler", "steps", "samples", *metrics):
        table.add_column(heading, justify="left" if heading == "sampler" else "right")
    for row in sorted(rows, key=lambda row: row["provenance"]["num_steps"] is None):
        made_with = row["provenance"]
        cells = [f"{row[m]:.4g}" + (f" ± {row[f'{m}_std']:.2g}" if row.get(f"{m}_std") else "") for m in metrics]
        table.add_row(made_with["sampler"], str(made_with["num_steps"] or ""), str(made_with["num_samples"]), *cells)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    console.print(f"figures with their provenance: {file}", soft_wrap=True)
