"""Why a student can be better than its teacher, where the right answer is known: `python benchmarks/known_truth.py`.

The data are draws of a mixture of 40 Gaussians in 48 dimensions (see exact_ode.py): its optimal denoiser is known, and
so is where the exact ODE leads from any noise. A teacher is trained on the draws. Students of it are made by halving
and by parallel decoding with as many network passes; and, as a control, students of the optimal denoiser itself, from
the same start. Of the images of each, from the same noise:

- `to the exact end`, `to the teacher's`: rms distance over the values of a sample, median over samples;
- `Frechet`: distance to the mixture's own mean and covariance, of the values themselves;
- `log-likelihood`: of a sample under the mixture, nats, less that of the mixture's own draws: like precision, below 0
  for samples that lie off the data;
- `shares`: half the sum of the differences between how often each mode is met and how often it ought to be: like
  recall, 0 is best.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from exact_ode import MIXTURES, Mixture, rms
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pdistill.bars import bar
from pdistill.denoiser import Denoiser
from pdistill.method.halving import Halving
from pdistill.method.parallel_decoding import ParallelDecoding
from pdistill.metrics.distances import FrechetDistance
from pdistill.network import unet
from pdistill.parameterization import X
from pdistill.sampling import DDIM, sample
from pdistill.steps import Stage
from pdistill.training.distillation import DistillationModule
from pdistill.training.module import DenoisingModule, Recipe
from pdistill.training.settings import Distillation, Steps, Training
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import min_snr_plus_one

BATCH, FINAL_DECAY, MANY = 64, 0.3, 128
COUNTS = (8, 4, 2, 1)


class Optimal(nn.Module):
    """The mixture's denoiser in the place of a trained teacher."""

    num_steps, num_classes, guidance, sampler = None, None, None, DDIM

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, mixture.schedule

    def forward(self, z: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return self.mixture(z.double(), t.double()).float()


def trained(module: DenoisingModule, mixture: Mixture, updates: int, name: str) -> Denoiser:
    """The average, by the published rule, of the module's denoiser over so many updates; the rate falls at the end."""
    settings = module.recipe.settings
    optimizer = torch.optim.AdamW(module.denoiser.parameters(), settings.learning_rate, weight_decay=0.0)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (updates - k) / (FINAL_DECAY * updates)))
    ema = AveragedModel(module.denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.001 ** (1 / updates)))
    for _ in bar(range(updates), name, unit="update"):
        losses, _ = module.losses({"image": mixture.draw(BATCH).float()})
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(module.denoiser.parameters(), 1.0)
        optimizer.step()
        falls.step()
        ema.update_parameters(module.denoiser)
    return ema.module.eval()


def students(teacher: Any, start: Denoiser, mixture: Mixture, passes: int, name: str) -> dict[str, dict[int, Denoiser]]:
    """Method -> step count -> student. Halving takes 5 passes an update, parallel decoding 4."""
    recipe = Recipe(Distillation(learning_rate=1e-3), min_snr_plus_one)

    def learned(method: Any, stage: Stage, taught_by: Any, begins: Denoiser, updates: int) -> Denoiser:
        module = DistillationModule(copy.deepcopy(taught_by), stage, recipe, method, start=begins)
        return trained(module, mixture, updates, f"{name}, {stage.name}")

    plan = Steps(plan=[32, 16, 8, 4, 2, 1], updates=1, updates_last_two=2)  # in the proportions of the demo's
    stages = Halving().stages(plan)
    share = passes / 5 / sum(stage.updates for stage in stages)
    halved, results = {}, [(teacher, start)]
    for stage in stages:
        taught_by, begins = results[-1]
        student = learned(Halving(), stage, taught_by, begins, int(share * stage.updates))
        halved[stage.num_steps] = student
        results.append((student, student))
    method = ParallelDecoding()
    (stage,) = method.stages(Steps(plan=[32, *COUNTS]))
    parallel = learned(method, stage, teacher, start, passes // 4)
    return {"halving": halved, "parallel decoding": {n: parallel.for_steps(n) for n in COUNTS}}


def log_likelihood(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) nats, and (B, modes) each mode's part of them."""
    distances = (x.flatten(1)[:, None] - mixture.means).square().sum(-1)
    parts = -distances / mixture.variances / 2 - 24 * (2 * torch.pi * mixture.variances).log()
    return torch.logsumexp(parts, 1) - torch.tensor(len(mixture.means)).log(), parts


def distribution(mixture: Mixture) -> FrechetDistance:
    """From the mixture's own mean and covariance."""
    mean = mixture.means.mean(0)
    covariance = torch.cov(mixture.means.T, correction=0) + mixture.variances.mean() * torch.eye(48).double()
    return FrechetDistance(mean, covariance)


def described(mixture: Mixture, ends: Tensor, exact: Tensor, teachers: Tensor, own: Tensor) -> list[str]:
    """The columns of the table."""
    likelihood, parts = log_likelihood(mixture, ends)
    shares = parts.argmax(1).bincount(minlength=len(mixture.means)) / len(ends)
    values = [float(rms(ends - exact).median()), float(rms(ends - teachers).median())]
    values += [distribution(mixture).of(ends.flatten(1)), float(likelihood.mean() - own)]
    return [*(f"{v:.4f}" for v in values), f"{float((shares - 1 / len(shares)).abs().sum() / 2):.3f}"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the mixture, the network, training and noise")
    parser.add_argument("--updates", type=int, default=2000, help="of the teacher (default 2,000)")
    parser.add_argument("--passes", type=int, default=10_500, help="of each way to students (default 10,500)")
    parser.add_argument("--samples", type=int, default=2000)
    options = parser.parse_args()
    mixture = Mixture(*MIXTURES["40 modes"], seed=options.seed)
    torch.manual_seed(options.seed)
    new = Denoiser(unet(4, 3, 3, 32, 128, [1, 2], 1, [4]), X(), mixture.schedule)
    teaching = TeacherModule(new, Recipe(Training(learning_rate=1e-3, updates=options.updates), min_snr_plus_one))
    teacher = trained(teaching, mixture, options.updates, "teacher")
    noise, many = mixture.noise(options.samples), float(log_likelihood(mixture, mixture.draw(50_000))[0].mean())
    exact = mixture.exact(noise)

    def ends(denoiser: Callable[..., Tensor], n: int) -> Tensor:
        with torch.inference_mode():
            return sample(denoiser, noise.float(), n, clip=False).double()

    theirs = ends(teacher, MANY)
    rows = [("the mixture's draws", "", mixture.draw(options.samples)), ("the exact ODE", "", exact)]
    rows += [("the trained teacher", n, ends(teacher, n)) for n in (MANY, *COUNTS)]
    for whose, taught_by in (("trained teacher", teacher), ("optimal denoiser", Optimal(mixture))):
        made = students(taught_by, teacher, mixture, options.passes, whose)
        rows += [(f"{method}, {whose}", n, ends(made[method][n], n)) for method in made for n in COUNTS]
    print("| images of | steps | to the exact end | to the teacher's | Frechet | log-likelihood | shares |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, n, images in rows:
        print(f"| {name} | {n} | " + " | ".join(described(mixture, images, exact, theirs, many)) + " |", flush=True)


if __name__ == "__main__":
    main()
