"""Batches as functions of their key, what names a dataset, and the checks of its settings."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pdistill.dataset import ImageSet, cifar10, digits, image_folder, imagenet64, lsun
from pdistill.dataset.batches import to_float, to_uint8
from pdistill.dataset.huggingface import load
from pdistill.errors import UserError


def numbered(count: int, flips: bool = False) -> ImageSet:
    """Image i is [i, 255 - i]."""
    left = torch.arange(count, dtype=torch.uint8)
    return ImageSet("numbers", torch.stack([left, 255 - left], -1)[:, None, None], flips=flips)


def test_the_digits_are_scikit_learns(monkeypatch):
    """Read from its file, and by itself where the file lies elsewhere."""
    theirs = load_digits()
    of_file = digits()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for data in (of_file, digits()):
        assert torch.equal(data.labels, torch.from_numpy(theirs.target))
        assert np.array_equal(data.images[:, 0].numpy(), np.round(theirs.images * (255 / 16)))


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
    """And a step's images, mirrored or not, are the same for any number of ranks."""
    data = numbered(20)
    ranks = [data.batches(batch_size, 0, 1, rank, world) for rank in range(world)]
    seen = [i for step in range(10) for r in ranks for i in r.batch(step)["image"][..., 0].flatten().tolist()]
    assert all(sorted(seen[k : k + 20]) == list(range(20)) for k in (0, 20, 40))
    assert seen[:20] != seen[20:40]

    flipped = numbered(20, flips=True)
    alone = torch.cat([flipped.batches(6, 0, 1).batch(step)["image"] for step in range(900)])
    ranks = [flipped.batches(batch_size, 0, 1, rank, world) for rank in range(world)]
    assert torch.equal(alone, torch.cat([r.batch(step)["image"] for step in range(900) for r in ranks]))
    mirrored = (alone[:, 0, 0, 0] > 127).float()
    assert abs(mirrored.mean() - 0.5) < 0.03  # of 5,400, over the border of a block of draws


def test_order_and_flips_are_other_for_each_seed_and_stage_and_epoch():
    """Keys of different lengths and purposes do not collide."""
    data = numbered(200, flips=True)

    def of(seed, stage, step=0):
        return data.batches(200, seed, stage).batch(step)["image"].flatten().tolist()

    drawn = [of(0, 0), of(0, 1), of(1, 0), of(0, 0, 1), of(0, 0, 2)]
    assert len({tuple(x) for x in drawn}) == len(drawn)
    mirrored = [tuple(v > 127 for v in x[::2]) for x in drawn]
    assert len(set(mirrored)) == len(drawn)


def test_uint8_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).aminmax() == (-1, 1)


def test_the_fingerprint_names_pixels_and_labels_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for k in range(4):
        (tmp_path / "photos" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "ab"[k % 2] / f"{k}.png")
    data = image_folder(str(tmp_path / "photos"), 8)
    in_memory = ImageSet("another name", data.images.clone(), data.labels.clone())
    assert in_memory.fingerprint == data.fingerprint
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert image_folder(str(tmp_path / "moved"), 8, flips=False).fingerprint == data.fingerprint

    for image in range(4):
        changed = data.images.clone()
        changed[image, 2, 7, 7] ^= 1
        assert ImageSet("x", changed, data.labels).fingerprint != data.fingerprint
    assert ImageSet("x", data.images).fingerprint != data.fingerprint
    assert ImageSet("x", data.images, data.labels.flip(0)).fingerprint != data.fingerprint
    assert ImageSet("x", data.images.flip(0), data.labels.flip(0)).fingerprint != data.fingerprint
    assert ImageSet("x", data.images.view(4, 3, 4, 16), data.labels).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), None, r"must be uint8 \(N, C, H, W\), not torch.float32"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), None, r"must be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), None, r"must be uint8"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, -1]), r"not from -1 to 0"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]), r"must be int64 \(2,\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0.0, 1.0]), r"must be int64"),
    ],
)
def test_an_image_set_of_ones_own_is_checked(images, labels, message):
    with pytest.raises(UserError, match=rf"of dataset mine .*{message}"):
        ImageSet("mine", images, labels)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("image_size", [7.5, 8.0, 0, -8, "a", None, True, [8]]),
        ("image_channels", [2, 0, "3", 1.5, True, None]),
        ("resize", ["nearest", None, 3]),
        ("background", ["no colour", 0, None, [255, 255, 255]]),
        ("max_corrupt_fraction", [-0.1, 1.5, "a", float("nan"), float("inf"), None, True]),
        ("flips", ["no", 1, None]),
        ("shuffle_buffer", [0, 1.5, "a", None]),
        ("reference_images", [0, 2.5, -1, None]),
        ("streaming", ["no", 1]),
        ("path", [None, "", True, "a\0b"]),
        ("cache", ["", True]),
    ],
)
def test_every_wrong_setting_is_refused_with_its_key(tmp_path, monkeypatch, key, values):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "1.png")
    for dataset in (image_folder, load):
        if dataset is image_folder and key in ("shuffle_buffer", "reference_images", "streaming"):
            continue
        for value in values:
            options = {"path": str(tmp_path / "photos"), "image_size": 8} | {key: value}
            with pytest.raises(UserError, match=rf"dataset\.{key}\b") as error:
                dataset(**options)
            assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists() or key in ("path", "cache")


def test_a_missing_path_is_named():
    for dataset, options in ((cifar10, {}), (imagenet64, {}), (lsun, {"category": "bedroom"})):
        with pytest.raises(UserError, match=r"dataset.path is missing"):
            dataset(None, **options)


def test_importing_datasets_brings_in_nothing_heavy():
    heavy = ("diffusers", "lightning", "matplotlib", "torchvision", "datasets", "sklearn")
    code = f"import sys, pdistill.dataset.huggingface; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
