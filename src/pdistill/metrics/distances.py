"""Metrics of two sets of features (N, num_features): FID and its intervals, KID, Inception score, precision, recall.

Inception score, precision and recall are torch-fidelity's, KID's kernel is torchmetrics'. FID is the same number as
torch-fidelity's, from eigenvalues of symmetric matrices in float64 with the reference's root kept, so that many can be
taken.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.kid import poly_mmd

from pdistill.errors import UserError

KID_SUBSETS, KID_SUBSET = 20, 1000
PRC_IMAGES = 10_000  # of either side at most: precision and recall compare every pair
EXTRAPOLATED_FROM = 15  # sample sizes


class FrechetDistance:
    """|m - m_r|^2 + tr(C + C_r - 2 (C_r^1/2 C C_r^1/2)^1/2) to the reference's features (Heusel et al., 2017)."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        """`mean` (num_features,), `covariance` (num_features, num_features): the reference's, in float64."""
        values, vectors = torch.linalg.eigh(covariance)
        self.mean, self.trace = mean, covariance.trace()
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def __call__(self, features: Tensor, counts: Tensor | None = None) -> float:
        """`counts` (N,): how often each row is taken; by default once."""
        features = features.to(self.mean)
        counts = torch.ones(len(features), dtype=torch.long, device=features.device) if counts is None else counts
        mean = counts.to(features) @ features / counts.sum()
        covariance = torch.cov(features.T, fweights=counts)
        eigenvalues = torch.linalg.eigvalsh(self.root @ covariance @ self.root)
        cross = eigenvalues.clamp(min=0).sqrt().sum()
        return float((mean - self.mean).square().sum() + covariance.trace() + self.trace - 2 * cross)

    def bootstrap_std(self, features: Tensor, resamplings: int) -> float:
        """The standard deviation of the distance over samples drawn with replacement from the features."""
        random, n = torch.Generator().manual_seed(0), len(features)
        draws = (torch.randint(n, (n,), generator=random) for _ in range(resamplings))
        return float(np.std([self(features, draw.bincount(minlength=n).to(features.device)) for draw in draws], ddof=1))

    def extrapolated(self, features: Tensor) -> tuple[float, float]:
        """FID-infinity (Chong & Forsyth, 2020): the line through FID against 1/N, at 1/N = 0.

        Sample sizes from a tenth of N to N, each a random subset; wants num_features well below N / 10. Also the
        standard error of the fit.
        """
        random, n = torch.Generator().manual_seed(0), len(features)
        sizes = np.linspace(max(2, n // 10), n, EXTRAPOLATED_FROM).astype(int)
        subsets = (features[torch.randperm(n, generator=random)[:size]] for size in sizes)
        (_, at_zero), covariance = np.polyfit(1 / sizes, [self(subset) for subset in subsets], 1, cov=True)
        return float(at_zero), float(covariance[1, 1] ** 0.5)


def kernel_distance(fake: Tensor, real: Tensor) -> tuple[float, float]:
    """KID (Binkowski et al., 2018), mean and standard deviation over subsets of at most 1,000 of either side."""
    random, size = torch.Generator().manual_seed(0), min(KID_SUBSET, len(fake), len(real))

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=random)[:size]]

    distances = torch.stack([poly_mmd(subset(real), subset(fake)) for _ in range(KID_SUBSETS)])
    return float(distances.mean()), float(distances.std(correction=0))


def measures(
    fake: Tensor,
    real: Tensor,
    distance: FrechetDistance,
    logits: Callable[[Tensor], Tensor],
    bootstrap: int,
    extrapolate: bool = False,
) -> dict[str, float | None]:
    """fid, kid, is, precision and recall of features `fake`.

    `*_std` are their standard deviations: FID's over resampled fakes, KID's over subsets, the score's over tenths.

    `distance` is to all of the reference, of which `real` may be a part. `logits` maps features to the classifier's.
    Raises UserError where features are not finite, or all the same.
    """
    if not fake.isfinite().all():
        raise UserError("some samples are not finite (NaN or infinite): nothing to measure. Did training diverge?")
    if len(fake) > 1 and fake.std(0).max() == 0:
        raise UserError("the samples are all alike: nothing to measure. Was the denoiser trained?")
    row = {"fid": distance(fake), "fid_std": distance.bootstrap_std(fake, bootstrap) if bootstrap > 1 else None}
    if extrapolate:
        row["fid_infinity"], row["fid_infinity_std"] = distance.extrapolated(fake)
    row["kid"], row["kid_std"] = kernel_distance(fake, real)
    score = isc_features_to_metric(logits(fake))
    row |= {"is": score["inception_score_mean"], "is_std": score["inception_score_std"]}
    prc = prc_features_to_metric(fake[:PRC_IMAGES], real[:PRC_IMAGES], verbose=False)
    for key, images in (("precision", fake), ("recall", real)):  # shares of these images, so binomial
        share, n = float(prc[key]), min(len(images), PRC_IMAGES)
        row |= {key: share, f"{key}_std": (share * (1 - share) / n) ** 0.5}
    return row
