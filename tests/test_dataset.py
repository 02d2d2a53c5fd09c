"""Batches as functions of their key, image folders, and the Frechet distance."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from pdistill.dataset import Batches, digits, image_folder, to_float, to_uint8
from pdistill.errors import UserError
from pdistill.metrics import fid_metric, measure_fid, train_classifier


def test_a_stream_resumed_at_a_step_is_the_stream():
    data = digits()
    stream, resumed = iter(Batches(data, 4, 0, 1, 0, start=0)), iter(Batches(data, 4, 0, 1, 0, start=3))
    first = [next(stream) for _ in range(5)]
    for expected in first[3:]:
        batch = next(resumed)
        assert batch["step"] == expected["step"]
        assert torch.equal(batch["image"], expected["image"]) and torch.equal(batch["label"], expected["label"])
    other_rank = next(iter(Batches(data, 4, 0, 1, 1, start=0)))
    assert not torch.equal(first[0]["image"], other_rank["image"])


def test_uint8_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).aminmax() == (-1, 1)


def test_image_folder(tmp_path):
    """Other sizes, modes and formats; the class is the folder; the crop is central."""
    for name, mode, size in (("a/1.png", "RGB", (40, 30)), ("a/2.jpg", "RGB", (16, 16)), ("b/3.png", "L", (8, 20))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, size, 200 if mode == "L" else (200, 100, 0)).save(tmp_path / name)
    edge = Image.new("RGB", (40, 20), (0, 0, 255))
    edge.paste((255, 0, 0), (10, 0, 30, 20))  # the central square is red
    edge.save(tmp_path / "b" / "4.png")
    data = image_folder(str(tmp_path), 8)
    assert data.images.shape == (4, 3, 8, 8) and data.labels.tolist() == [0, 0, 1, 1]
    assert data.images[0, :, 4, 4].tolist() == [200, 100, 0]
    assert data.images[3, :, 4, 0].tolist() == [255, 0, 0]
    assert image_folder(str(tmp_path / "a"), 8, 1).labels is None
    (tmp_path / "a" / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"5\.png cannot be read"):
        image_folder(str(tmp_path), 8)


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
