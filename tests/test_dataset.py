"""Batches as functions of their key, and the Frechet distance."""

import numpy as np
import pytest
import scipy.linalg
import torch

from pdistill.dataset import ImageSet, digits
from pdistill.dataset.batches import to_float, to_uint8
from pdistill.metrics.extractors import train_classifier
from pdistill.metrics.reference import fid_metric, measure_fid


def test_a_stream_resumed_at_a_step_is_the_stream():
    data = digits()
    stream, resumed = iter(data.batches(4, 0, 1)), iter(data.batches(4, 0, 1, start=3))
    first = [next(stream) for _ in range(5)]
    for expected in first[3:]:
        batch = next(resumed)
        assert batch["step"] == expected["step"]
        assert torch.equal(batch["image"], expected["image"]) and torch.equal(batch["label"], expected["label"])


@pytest.mark.parametrize(("world", "batch_size"), [(1, 6), (2, 3), (3, 2)])
def test_ranks_share_every_epoch_without_overlap_or_loss(world, batch_size):
    """And a step's images are the same for any number of ranks."""
    data = ImageSet("numbers", torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1))
    ranks = [data.batches(batch_size, 0, 1, rank, world) for rank in range(world)]
    seen = [i for step in range(10) for r in ranks for i in r.batch(step)["image"].flatten().tolist()]
    assert all(sorted(seen[k : k + 20]) == list(range(20)) for k in (0, 20, 40))
    assert seen[:20] != seen[20:40]
    assert seen == [i for step in range(10) for i in data.batches(6, 0, 1).batch(step)["image"].flatten().tolist()]


def test_uint8_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).aminmax() == (-1, 1)


def test_classifier_fid_against_scipy_and_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path))
    data = digits()
    extractor = train_classifier(data, epochs=6)
    accuracy = (extractor.head(extractor(data.images)).argmax(1) == data.labels).float().mean()
    assert accuracy > 0.9
    fake = (torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1).split(100)
    ours = measure_fid(fid_metric(extractor, data), iter(fake))
    real, made = (extractor(x).double().numpy() for x in (data.images, to_uint8(torch.cat(fake))))
    (m1, c1), (m2, c2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (real, made))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert ours == pytest.approx(expected, rel=1e-4)

    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(files) == 2
    again = measure_fid(fid_metric(train_classifier(data, epochs=6), data), iter(fake))
    assert again == ours and files == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
