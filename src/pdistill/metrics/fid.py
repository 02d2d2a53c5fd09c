"""FID of a denoiser: what training, distillation and the teacher's curve report."""

import torch
from torch import nn

from pdistill.dataset import ImageSet
from pdistill.dataset.batches import to_uint8
from pdistill.denoiser import Denoiser
from pdistill.generation import Draw, generate
from pdistill.metrics.distances import FrechetDistance, check_finite, home_of_doubles
from pdistill.metrics.extractors import metric_name
from pdistill.metrics.provenance import Provenance, drawn_by, guided_by, measured_with
from pdistill.metrics.reference import reference
from pdistill.metrics.shares import my_batches, together
from pdistill.sampling import sampler_of


class FID:
    """The Frechet distance of samples to a whole dataset, with any extractor; `name` says whose."""

    def __init__(
        self, extractor: nn.Module, data: ImageSet, num_samples: int = 2000, seed: int = 0, batch_size: int = 250
    ) -> None:
        self.name = metric_name("fid", extractor)
        self.extractor = extractor
        self.data = data
        self.num_samples = num_samples
        self.seed = seed
        self.batch_size = batch_size
        self.device: torch.device | str = "cpu"  # of the last measurement
        self._distance: FrechetDistance | None = None

    def measure(
        self, denoiser: Denoiser, num_steps: int, device: torch.device | str = "cpu", sampler: str | None = None
    ) -> float:
        """The metric over all processes, each of which must call it: the same for any number of them.

        Sample i is made from (seed, i), in the same batch, by default by the denoiser's own sampler. The denoiser must
        be on `device`. Raises UserError, on all, for samples that are not finite.
        """
        self.device = device
        self.extractor.to(device)
        metric = self._metric(device)
        metric.reset()
        draw = self._draw(num_steps, sampler)
        training = denoiser.training
        denoiser.eval()
        try:
            together(lambda: self._update(metric, denoiser, draw))
        finally:
            denoiser.train(training)
        return float(metric.compute())

    @torch.inference_mode()
    def _update(self, metric: FrechetDistance, denoiser: Denoiser, draw: Draw) -> None:
        metric.update(metric.mean.new_zeros(0, len(metric.mean)))  # of processes without a batch
        title = f"{self.name}, {draw.num_steps} step{'s' * (draw.num_steps > 1)}"
        for batch in my_batches(self.num_samples, self.batch_size, title):
            for images in generate(denoiser, batch, draw, self.device):
                features = self.extractor(to_uint8(images)).float()
                check_finite(features)
                metric.update(features)

    def provenance(self, denoiser: Denoiser, num_steps: int, sampler: str | None = None) -> Provenance:
        """What the metric is measured with."""
        shared = measured_with(self.extractor, self.data, self.num_samples, self.seed, self.device)
        used, clip = sampler_of(denoiser, sampler), self._draw(num_steps, sampler).clip and denoiser.clips
        return shared | drawn_by(denoiser.fingerprint, used, num_steps, clip) | guided_by(denoiser, num_steps)

    def _draw(self, num_steps: int, sampler: str | None) -> Draw:
        return Draw(num_steps, self.seed, self.batch_size, sampler)

    def _metric(self, device: torch.device | str) -> FrechetDistance:
        if self._distance is None:
            measured = reference(self.extractor, self.data, device, features=False)
            self._distance = FrechetDistance(measured.mean, measured.covariance)
        return self._distance.to(home_of_doubles(device))
