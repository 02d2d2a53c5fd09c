"""One's own folder in one line, `experiment=demo dataset=<folder>`: pictures of any kind, and what is refused."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pdistill.commands.arguments import with_folders
from pdistill.dataset import ImageSet
from pdistill.metrics.classifier import Classifier
from pdistill.metrics.rotations import Rotations, fitting, train_rotations
from pdistill.network import small_unet, unet

SHORT = ("training.updates=4", "training.batch_size=8", "distillation.batch_size=8", "steps.plan=[2,1]")
SHORT += ("steps.updates_last_two=2", "metrics.num_samples=20", "metrics.extractor.max_updates=3")


@pytest.fixture
def pictures(tmp_path):
    """Large pictures as people have them: of several sizes, kinds and modes, beside a note."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(random.integers(0, 255, (480, 640, 3), np.uint8)).save(folder / f"{k}.jpg")
    colours = Image.fromarray(random.integers(0, 255, (900, 300, 4), np.uint8))
    colours.save(folder / "transparent.png")
    colours.convert("CMYK").save(folder / "print.jpg")
    colours.convert("P").save(folder / "palette.gif")
    colours.convert("L").save(folder / "grey.webp")
    Image.fromarray(random.integers(0, 65535, (700, 500), np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.convert("RGB").save(folder / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"no picture")  # 1 of 19: the demo leaves it out
    (folder / "notes.txt").write_text("from the holidays")
    return folder


def test_one_line_for_a_folder_of_pictures(run, workplace, pictures):
    status, _, err = run("distill.py", "experiment=demo", f"dataset={pictures}", "name=my_pictures", *SHORT)
    assert status == 0, err
    told = next(line for line in err.splitlines() if " images of " in line)
    assert told.startswith("image_folder:my pictures: 18 images of 3x16x16; a network of 1.37 M parameters; ")
    assert told.endswith("fid_rotations of 20 samples; in 2, 1 steps")
    directory = workplace / "outputs" / "my_pictures"
    rows = json.loads((directory / "summary.json").read_text())
    assert [row["stage"] for row in rows] == ["teacher", "parallel-0002", "steps-0001"]
    assert all(row["fid_rotations"] > 0 for row in rows)
    with Image.open(directory / "comparison.png") as sheet:
        assert sheet.size[0] > 100
    status, _, err = run("distill.py", "experiment=demo", f"dataset={pictures}", "name=my_pictures", *SHORT)
    assert status == 0 and err == ""  # finished


def test_bad_folders_are_told_in_a_line(told, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("no picture")
    expected = {
        "/nowhere/at/all": "dataset.path=/nowhere/at/all is not a directory or zip",
        f"{tmp_path}/empty": "holds no images (looked for .png, .jpg, ...",
        f"{tmp_path}/words": "passed over 1 files that are no pictures (1 .txt)",
        "nowhere": "Could not find 'dataset/nowhere'",
    }
    err = ""
    for value, words in expected.items():
        status, err = told("distill.py", "experiment=demo", f"dataset={value}")
        assert status == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err
    assert "or a folder or zip of pictures by its path" in err


def test_a_folder_in_the_place_of_a_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "digits", "it's here"):
        (tmp_path / name).mkdir()
    (tmp_path / "all.zip").touch()

    def path(word: str) -> str:
        return with_folders(["experiment=demo", word])[-1]

    assert with_folders(["a=b", "dataset=cats"]) == ["a=b", "dataset=image_folder", "dataset.path='cats'"]
    assert path("dataset=all.zip") == "dataset.path='all.zip'" and path("dataset=./x y") == "dataset.path='./x y'"
    assert path("dataset=it's here") == r"dataset.path='it\'s here'"
    for word in ("dataset=digits", "dataset=dogs", "dataset=mine/own", "dataset.path=cats", "dataset="):
        assert path(word) == word
    assert with_folders(["dataset=cats", "--config-dir", "conf"])[0] == "dataset=cats"  # perhaps a choice there
    assert os.listdir(tmp_path)


def test_the_network_fits_the_size():
    digits = unet(8, 1, 1, 32, 128, [1, 2], 1, [4])
    assert small_unet(8, 1, 1, 32, 128).config == digits.config
    for size, levels in ((4, 1), (16, 3), (28, 3), (32, 4), (17, 1)):
        network = small_unet(size, 3, 3, 32, 128)
        assert len(network.config["block_out_channels"]) == levels
        assert network(torch.zeros(1, 3, size, size), torch.zeros(1)).sample.shape == (1, 3, size, size)


def test_the_extractor_fits_the_data(monkeypatch, tmp_path):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path))
    images = torch.randint(0, 255, (50, 3, 8, 8), dtype=torch.uint8)
    assert type(fitting(ImageSet("two", images, torch.arange(50) % 2), 2)) is Classifier
    for labels in (None, torch.arange(50) % 25):  # two images of a class teach nothing
        assert type(fitting(ImageSet("some", images, labels), 2)) is Rotations


def test_rotations_tell_which_way_is_up(monkeypatch, tmp_path):
    """Features of images that have an up: turned ones lie elsewhere."""
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path))
    images = torch.randint(0, 60, (64, 1, 8, 8), dtype=torch.uint8)
    images[:, :, :4] += 150  # the sky
    extractor = train_rotations(ImageSet("skies", images)).eval()
    with torch.inference_mode():
        up, again, down = (extractor(x).mean(0) for x in (images[:32], images[32:], images[:32].rot90(2, (2, 3))))
    assert (up - down).norm() > 10 * (up - again).norm()
