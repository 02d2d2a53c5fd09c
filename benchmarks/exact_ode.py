"""How near the steps of a teacher, and targets made of them, come to the exact ODE: `python benchmarks/exact_ode.py`.

Teachers are the optimal denoisers of mixtures of Gaussians in 48 dimensions, cosine schedule. First from noise to data:
the distance (rms over a sample's values, median over samples) to the end of the exact ODE from the same noise, for
targets of blocks of k teacher steps, each learned perfectly. Then targets as in training, at 32 steps of k = 2 from z_t
of images that the mixture draws: root of (SNR + 1) times the mean squared distance to the exact target.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from pdistill.parameterization import broadcast
from pdistill.sampling import sample
from pdistill.schedule import CosineSchedule
from pdistill.target import analytic_variance, distillation_target, measured_variance

SHAPE = (3, 4, 4)
MIXTURES = {"40 modes": (40, (0.1, 0.3)), "40 narrow modes": (40, (0.02, 0.05)), "10 narrow modes": (10, (0.02, 0.05))}
STEPS = [(64, 1), (256, 1), (64, 2), (64, 4), (64, 8), (128, 8)]  # of the teacher, and of these in a block


class Mixture:
    """E[x | z_t] of Gaussians about `modes` uniform points of [-1, 1]^48, of deviations between two `spreads`."""

    num_classes = None

    def __init__(self, modes: int, spreads: tuple[float, float], seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.schedule = CosineSchedule()
        self.means = 2 * torch.rand(modes, 48, generator=self.generator, dtype=torch.float64) - 1
        low, high = spreads
        self.variances = (low + (high - low) * torch.rand(modes, generator=self.generator, dtype=torch.float64)) ** 2

    def __call__(self, z: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        z_t = z.flatten(1)
        alpha, sigma = (a[:, None] for a in self.schedule.alpha_sigma(self.schedule(t)))
        total = alpha**2 * self.variances + sigma**2  # (B, modes): variance of z_t about a mode
        distances = (z_t[:, None] - alpha[..., None] * self.means).square().sum(-1)
        share = torch.softmax(-24 * total.log() - distances / total / 2, 1)
        gain = alpha * self.variances / total
        return ((share * (1 - gain * alpha)) @ self.means + (share * gain).sum(1, keepdim=True) * z_t).view_as(z)

    def noise(self, count: int) -> Tensor:
        """(count, 3, 4, 4)."""
        return torch.randn(count, *SHAPE, generator=self.generator, dtype=torch.float64)

    def draw(self, count: int) -> Tensor:
        """Images (count, 3, 4, 4) of the mixture."""
        k = torch.randint(len(self.means), (count,), generator=self.generator)
        noise = self.noise(count)
        return self.means[k].view_as(noise) + broadcast(self.variances[k].sqrt(), noise) * noise

    def exact(self, z: Tensor) -> Tensor:
        """The end of the ODE from z, to second order of 1,024 steps (Richardson's extrapolation)."""
        few, many = (sample(self, z, n, clip=False) for n in (512, 1024))
        return 2 * many - few


class Taught:
    """Predicts the target of blocks of `teacher_steps` steps of a kind exactly."""

    num_classes = None

    def __init__(self, teacher: Any, num_steps: int, teacher_steps: int, **kind: Any) -> None:
        self.teacher, self.counts, self.kind = teacher, (num_steps, None, teacher_steps), kind
        self.schedule = teacher.schedule

    def __call__(self, z: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return distillation_target(self.teacher, z, t, *self.counts, **self.kind)


def rms(difference: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)."""
    return difference.square().mean((1, 2, 3)).sqrt()


def sampled(mixture: Mixture, count: int) -> dict[str, float]:
    """Distances to the end of the exact ODE."""
    z = mixture.noise(count)
    exact = mixture.exact(z)

    def distance(n: int, k: int, **kind: Any) -> float:
        return float(rms(sample(Taught(mixture, n // k, k, **kind), z, n // k, clip=False) - exact).median())

    found = {f"DDIM, {n} steps": distance(n, k) for n, k in STEPS if k == 1}
    found |= {f"second order, {n} steps, k = {k}": distance(n, k, order=2) for n, k in STEPS if k > 1}
    return found | {"aDDIM, 64 steps": distance(64, 2, variance=analytic_variance)}


def trained(mixture: Mixture, count: int, num_steps: int = 32) -> dict[str, tuple[float, float]]:
    """Median and rms of the weighted distances to the exact targets."""
    x = mixture.draw(count)
    t = torch.randint(2, num_steps + 1, (count,), generator=mixture.generator).double() / num_steps
    alpha, sigma = (broadcast(a, x) for a in mixture.schedule.alpha_sigma(mixture.schedule(t)))
    z = alpha * x + sigma * mixture.noise(count)
    few, many = (distillation_target(mixture, z, t, num_steps, None, k) for k in (32, 64))
    kinds = {"DDIM": {}, "second order": {"order": 2}, "aDDIM, formula": {"variance": analytic_variance}}
    kinds |= {"aDDIM, measured": {"variance": measured_variance(x)}}
    found = {}
    for name, kind in kinds.items():
        target: Tensor = distillation_target(mixture, z, t, num_steps, **kind)
        weighted = rms(target - (2 * many - few)) * (mixture.schedule(t).exp() + 1).sqrt()
        found[name] = float(weighted.median()), float(weighted.square().mean().sqrt())
    return found


def main() -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=128)
    count = parser.parse_args().samples
    columns = [(Mixture(*of), Mixture(*of, seed=1)) for of in MIXTURES.values()]
    ends = [sampled(first, count) for first, _ in columns]
    targets = [trained(second, 4 * count) for _, second in columns]
    print("| | " + " | ".join(MIXTURES) + " |\n| --- |" + " ---: |" * len(MIXTURES))
    for name in ends[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.4f}" for column in ends) + " |")
    print("\n| target | " + " | ".join(f"{name}: median, rms" for name in MIXTURES) + " |")
    print("| --- |" + " ---: |" * len(MIXTURES))
    for name in targets[0]:
        print(f"| {name} | " + " | ".join(f"{column[name][0]:.4f}, {column[name][1]:.4f}" for column in targets) + " |")


if __name__ == "__main__":
    main()
