"""Metrics of two sets of features (N, num_features): FID and its intervals, KID, Inception score, precision, recall.

The Inception score is torch-fidelity's, KID's kernel torchmetrics'. FID, precision and recall are the same numbers as
torch-fidelity's: FID from eigenvalues of symmetric matrices in float64, with the reference's root kept, so that many
can be taken; precision and recall part by part, so that a bar moves. Fewer samples than a metric needs leave it out:
ten for the Inception score, four for precision and recall.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics import Metric
from torchmetrics.image.kid import poly_mmd

from pdistill.bars import bar
from pdistill.errors import UserError
from pdistill.randomness import generator

KID_SUBSETS, KID_SUBSET = 20, 1000
SCORE_SPLITS = 10  # the Inception score is a mean over so many parts
PRC_NEIGHBOURS = 3
PRC_IMAGES = 10_000  # of either side at most: precision and recall compare every pair
EXTRAPOLATED_FROM = 15  # sample sizes
PART = 2048  # rows of features that are worked on at once


def home_of_doubles(device: torch.device | str) -> torch.device | str:
    """The device itself, or the CPU where it has no float64."""
    return "cpu" if str(device).startswith("mps") else device


def double(values: Tensor) -> Tensor:
    """float64, on the CPU where the device has no such numbers."""
    return values.to(home_of_doubles(values.device)).double()


class FrechetDistance(Metric):
    """|m - m_r|^2 + tr(C + C_r - 2 (C_r^1/2 C C_r^1/2)^1/2) to a reference's features (Heusel et al., 2017).

    The reference is set once. `update` takes features batch by batch, `compute` gives the distance of all of them,
    those of other processes included. Sums are of differences from the reference's mean, in float64: nothing cancels.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    mean: Tensor
    root: Tensor
    trace: Tensor
    count: Tensor
    total: Tensor
    square: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        """`mean` (num_features,), `covariance` (num_features, num_features): the reference's, in float64."""
        super().__init__()
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        for name, value in {"mean": mean, "root": root, "trace": covariance.trace()}.items():
            self.register_buffer(name, value, persistent=False)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros_like(mean), dist_reduce_fx="sum")
        self.add_state("square", torch.zeros_like(covariance), dist_reduce_fx="sum")
        self.to(mean.device)

    def update(self, features: Tensor) -> None:
        """Adds features (B, num_features), of which B may be 0."""
        centred = double(features).to(self.mean.device) - self.mean
        self.count = self.count + len(centred)
        self.total = self.total + centred.sum(0)
        self.square = self.square + centred.T @ centred

    def compute(self) -> Tensor:
        """The distance of all features so far; at least two."""
        shift = self.total / self.count
        covariance = (self.square - self.count * shift[:, None] * shift) / (self.count - 1)
        return self._distance(shift, covariance)

    def of(self, features: Tensor, counts: Tensor | None = None) -> float:
        """The distance of features (N, num_features) by themselves.

        `counts` (N,): how often each row is taken; by default once.
        """
        mean, covariance = moments(features.to(self.mean.device), counts)
        return float(self._distance(mean - self.mean, covariance))

    def _distance(self, shift: Tensor, covariance: Tensor) -> Tensor:
        """Of a normal distribution with that covariance whose mean differs from the reference's by `shift`."""
        eigenvalues = torch.linalg.eigvalsh(self.root @ covariance @ self.root)
        cross = eigenvalues.clamp(min=0).sqrt().sum()
        return shift.square().sum() + covariance.trace() + self.trace - 2 * cross

    def bootstrap_std(self, features: Tensor, resamplings: int) -> float:
        """The standard deviation of the distance over samples drawn with replacement from the features."""
        random, n = torch.Generator().manual_seed(0), len(features)
        distances = []
        for _ in bar(range(resamplings), "FID of resamplings", unit="resampling"):
            counts = torch.randint(n, (n,), generator=random).bincount(minlength=n)
            distances.append(self.of(features, counts.to(self.mean.device)))
        return float(np.std(distances, ddof=1))

    def extrapolated(self, features: Tensor) -> tuple[float, float]:
        """FID-infinity (Chong & Forsyth, 2020): the line through FID against 1/N, at 1/N = 0.

        Sample sizes from a tenth of N to N, each a random subset; wants num_features well below N / 10. Also the
        standard error of the fit.
        """
        random, n = torch.Generator().manual_seed(0), len(features)
        sizes = np.linspace(max(2, n // 10), n, EXTRAPOLATED_FROM).astype(int)
        subsets = bar(sizes, "FID of smaller sets", unit="set")
        distances = [self.of(features[torch.randperm(n, generator=random)[:size]]) for size in subsets]
        (_, at_zero), covariance = np.polyfit(1 / sizes, distances, 1, cov=True)
        return float(at_zero), float(covariance[1, 1] ** 0.5)


def kernel_distance(fake: Tensor, real: Tensor) -> tuple[float, float]:
    """KID (Binkowski et al., 2018), mean and standard deviation over subsets of at most 1,000 of either side."""
    random, size = torch.Generator().manual_seed(0), min(KID_SUBSET, len(fake), len(real))

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=random)[:size]]

    distances = torch.stack(
        [poly_mmd(subset(real), subset(fake)) for _ in bar(range(KID_SUBSETS), "KID", unit="subset")]
    )
    return float(distances.mean()), float(distances.std(correction=0))


def precision_and_recall(fake: Tensor, real: Tensor) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019) with k = 3, and their binomial standard deviations.

    Of more than 10,000 samples the first are taken, of the reference a fixed random subset: its order may have a
    meaning.
    """
    fake = fake[:PRC_IMAGES]
    if len(real) > PRC_IMAGES:
        order = torch.randperm(len(real), generator=generator("precision and recall", len(real)))
        real = real[order[:PRC_IMAGES].to(real.device)]
    row, total = {}, sum(2 * len(rows.split(PART)) for rows in (fake, real))
    with bar((), "precision and recall", total, "part") as progress:
        for key, images, others in (("precision", fake, real), ("recall", real, fake)):
            share = _share_within(images, others, progress.update)  # of these images, so binomial
            row |= {key: share, f"{key}_std": (share * (1 - share) / len(images)) ** 0.5}
    return row


def _share_within(images: Tensor, others: Tensor, on_part: Callable[[], None]) -> float:
    """The share of features `images` that lie in the ball of one of `others`, which reaches to its k-th neighbour."""

    def of_parts(rows: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        found = []
        for part in rows.split(PART):
            found.append(measure(torch.cdist(part, others)))
            on_part()
        return torch.cat(found)

    radii = of_parts(others, lambda distances: distances.kthvalue(PRC_NEIGHBOURS + 1).values)  # the first is its own
    return float(of_parts(images, lambda distances: (distances <= radii).any(1)).float().mean())


def measures(
    fake: Tensor,
    real: Tensor,
    distance: FrechetDistance,
    logits: Callable[[Tensor], Tensor] | None,
    bootstrap: int,
    extrapolate: bool = False,
) -> dict[str, float | None]:
    """fid, kid, is, precision and recall of features `fake`, as far as there are samples enough for them.

    `*_std` are their standard deviations: FID's over resampled fakes, KID's over subsets, the score's over tenths.

    `distance` is to all of the reference, of which `real` may be a part. `logits` maps features to the classifier's;
    None leaves out the Inception score. Raises UserError where features are not finite, or all the same.
    """
    check_samples(fake)
    row: dict[str, float | None] = {"fid": distance.of(fake)}
    row["fid_std"] = distance.bootstrap_std(fake, bootstrap) if bootstrap > 1 else None
    if extrapolate:
        row["fid_infinity"], row["fid_infinity_std"] = distance.extrapolated(fake)
    row["kid"], row["kid_std"] = kernel_distance(fake, real)
    if logits is not None and len(fake) >= SCORE_SPLITS:
        score = isc_features_to_metric(logits(fake), splits=SCORE_SPLITS)
        row |= {"is": score["inception_score_mean"], "is_std": score["inception_score_std"]}
    if min(len(fake), len(real)) > PRC_NEIGHBOURS:
        row |= precision_and_recall(fake, real)
    return row


def check_samples(features: Tensor) -> None:
    """Raises UserError where the features of samples are not finite, or all the same."""
    check_finite(features)
    if len(features) > 1 and features.std(0).max() == 0:
        raise UserError("the samples are all alike: nothing to measure. Was the denoiser trained?")


def check_finite(features: Tensor) -> None:
    """Raises UserError where the features of samples are not finite."""
    if not features.isfinite().all():
        raise UserError("some samples are not finite (NaN or infinite): nothing to measure. Did training diverge?")


def moments(features: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (num_features,) and covariance of features (N, num_features), N > 1, in float64.

    `counts` (N,): how often each row is taken; by default once.
    """
    values = double(features)
    counts = torch.ones(len(values), device=values.device) if counts is None else counts
    weights = counts.to(values)
    mean = weights @ values / weights.sum()
    square = values.new_zeros(values.shape[1], values.shape[1])
    starts = range(0, len(values), PART)
    for start in bar(starts, "covariance", unit="part", within=True):
        centred = values[start : start + PART] - mean
        square += (centred * weights[start : start + PART, None]).T @ centred
    return mean, square / (weights.sum() - 1)
