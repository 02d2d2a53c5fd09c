"""Time per image of a sampler as it is, as ONNX, in int8, and as pt2: `python benchmarks/export.py DENOISER`.

All take turns in one process, with as many threads as torch has (`OMP_NUM_THREADS`); the medians are printed as one
Markdown table. With `--fid`, of a denoiser of digits, also the classifier's FID of each, mean and standard deviation
over three seeds of 2,000 samples against the training set.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pdistill.bars import bar
from pdistill.dataset import digits
from pdistill.dataset.batches import to_uint8
from pdistill.denoiser import Denoiser
from pdistill.interop import export
from pdistill.metrics.classifier import train_classifier
from pdistill.metrics.distances import FrechetDistance
from pdistill.metrics.reference import reference
from pdistill.randomness import sample_noise
from pdistill.report.tables import markdown
from pdistill.sampling import sample

BATCHES = (1, 64)
SAMPLES, AT_ONCE, SEEDS = 2000, 250, (0, 1, 2)  # of the FID


def inputs_of(denoiser: Denoiser, indices: range, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Noise, and labels of all classes in turn."""
    labels = None if denoiser.num_classes is None else torch.tensor(indices) % denoiser.num_classes
    return sample_noise(seed, indices, denoiser.image_shape), labels


def contestants(denoiser: Denoiser, graph: export.Graph, folder: Path) -> dict[str, export.Run]:
    """What takes turns, by its name."""
    export.write_onnx(denoiser, graph, folder / "a.onnx")
    export.write_onnx(denoiser, graph, folder / "int8.onnx", int8=True)
    export.write_pt2(denoiser, graph, folder / "a.pt2")
    return {
        "eager": lambda noise, label: to_uint8(sample(denoiser, noise, graph.num_steps, label)),
        "ONNX": export.open_onnx(folder / "a.onnx"),
        "ONNX int8": export.open_onnx(folder / "int8.onnx"),
        "pt2": export.open_pt2(folder / "a.pt2"),
    }


def seconds_per_image(runs: dict[str, export.Run], denoiser: Denoiser, batch: int, repeats: int) -> dict[str, float]:
    """The medians; the first round is not counted."""
    inputs = inputs_of(denoiser, range(batch))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in bar(range(repeats + 1), f"batches of {batch}", unit="round"):
        for name, run in runs.items():
            start = time.perf_counter()
            run(*inputs)
            taken[name].append((time.perf_counter() - start) / batch)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def measure_fid(denoiser: Denoiser) -> Callable[[export.Run], str]:
    """A function of a sampler that gives its FID as "mean +- deviation"."""
    data = digits()
    extractor = train_classifier(data)
    measured = reference(extractor, data, "cpu", features=False)

    @torch.inference_mode()
    def fid(run: export.Run) -> str:
        values = []
        for seed in SEEDS:
            metric = FrechetDistance(measured.mean, measured.covariance)
            for start in range(0, SAMPLES, AT_ONCE):
                images = run(*inputs_of(denoiser, range(start, start + AT_ONCE), seed))
                metric.update(extractor(images).float())
            values.append(float(metric.compute()))
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    return fid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("denoiser", type=Path, help="a student's directory")
    parser.add_argument("--repeats", type=int, default=30, help="of every batch (default 30)")
    parser.add_argument("--fid", action="store_true", help="also the digits classifier's FID")
    options = parser.parse_args()
    denoiser = Denoiser.load(options.denoiser)
    if denoiser.num_steps is None:
        parser.error(f"{options.denoiser} is a teacher: give a student")
    headings = ["sampler", *(f"ms per image, batch {batch}" for batch in BATCHES), "MB"]
    with tempfile.TemporaryDirectory() as folder:
        runs = contestants(denoiser, export.Graph(denoiser.num_steps, guidance=denoiser.default_guidance), Path(folder))
        files = {"ONNX": "a.onnx", "ONNX int8": "int8.onnx", "pt2": "a.pt2"}
        sizes = {name: f"{Path(folder, file).stat().st_size / 1e6:.1f}" for name, file in files.items()}
        taken = [seconds_per_image(runs, denoiser, batch, options.repeats) for batch in BATCHES]
        rows = [[name, *(f"{1000 * t[name]:.2f}" for t in taken), sizes.get(name, "")] for name in runs]
        if options.fid:
            headings.append("FID (classifier)")
            fid = measure_fid(denoiser)
            for row in rows:
                row.append(fid(runs[row[0]]))
    print(f"{denoiser.num_steps} steps, {torch.get_num_threads()} threads, torch {torch.__version__}, uint8 images\n")
    print("\n".join(markdown(headings, rows)))


if __name__ == "__main__":
    main()
