"""Every dataset in its true format on disk, and the cache that images go through."""

import hashlib
import json
import pickle
import shutil
import zipfile

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pdistill.dataset import cache as image_cache
from pdistill.dataset import cifar10, huggingface, image_folder, imagenet64, lsun
from pdistill.dataset.batches import BatchKey
from pdistill.dataset.columns import StreamError
from pdistill.dataset.pixels import Transform, square_pixels
from pdistill.dataset.stream import Stream, StreamedBatches
from pdistill.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def picture(seed: int, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Smooth noise, which survives JPEG."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes, several sizes, modes and formats."""
    root = tmp_path / "photos"
    for k, name in enumerate(("a/1.png", "a/2.jpg", "b/3.png", "b/4.webp", "b/5.JPEG", "b/6.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k, 40 + k, 30 - k, "L" if k == 2 else "RGB").save(root / name)
    return root


def test_a_folder_and_its_zip_are_one_dataset(folder, tmp_path):
    data = image_folder(str(folder), 8)
    assert data.images.shape == (6, 3, 8, 8) and data.labels.tolist() == [0, 0, 1, 1, 1, 1]
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
    zipped = image_folder(str(archive), 8)
    assert torch.equal(data.images, zipped.images) and torch.equal(data.labels, zipped.labels)
    assert data.digest == zipped.digest
    assert image_folder(str(folder / "a"), 8).labels is None


def test_the_crop_is_central_and_area_is_the_mean(folder):
    wide = Image.new("RGB", (40, 20), (0, 0, 255))
    wide.paste((255, 0, 0), (10, 0, 30, 20))  # the central square is red
    wide.save(folder / "a" / "0.png")
    assert image_folder(str(folder), 8).images[0, :, 4, 0].tolist() == [255, 0, 0]
    square = picture(0, 32, 32)
    ours, _ = square_pixels(square, Transform(8, resize="area"))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).double()
    assert np.abs(ours - torch.nn.functional.avg_pool2d(pixels, 4).numpy()).max() <= 0.5
    # 3 pixels on 2: each target covers one and a half
    row = np.array([[0, 100, 200]] * 3, np.uint8)
    assert square_pixels(Image.fromarray(row), Transform(2, 1, "area"))[0][0, 0].tolist() == [33, 167]


def test_a_cache_is_made_once_and_goes_on_where_it_was_killed(folder, cache, monkeypatch):
    monkeypatch.setattr(image_cache, "CHUNK", 2)
    whole = image_folder(str(folder), 8)
    (made,) = cache.iterdir()
    written = (made / "images.bin").stat().st_mtime_ns
    assert torch.equal(image_folder(str(folder), 8).images, whole.images)
    assert (made / "images.bin").stat().st_mtime_ns == written

    opened, real = [], image_cache.square_pixels

    def dies(image, *args):
        opened.append(image.size)
        if len(opened) == 4:
            raise KeyboardInterrupt
        return real(image, *args)

    monkeypatch.setattr(image_cache, "square_pixels", dies)
    with pytest.raises(KeyboardInterrupt):
        image_folder(str(folder), 8, cache=str(cache.parent / "mine"))
    assert json.loads((cache.parent / "mine" / "progress.json").read_text())["done"] == 2
    resumed = image_folder(str(folder), 8, cache=str(cache.parent / "mine"))
    assert len(opened) in (8, 9)  # two of them once, and what was under way when it died
    assert torch.equal(resumed.images, whole.images) and resumed.digest == whole.digest


def test_a_large_cache_stays_on_disk(folder, monkeypatch):
    in_memory = image_folder(str(folder), 8)
    monkeypatch.setattr(image_cache, "IN_MEMORY", 0)
    mapped = image_folder(str(folder), 8)
    assert mapped.fingerprint == in_memory.fingerprint
    loader = DataLoader(mapped.batches(4, 0, 1), batch_size=None, num_workers=2)
    for step, batch in zip(range(5), loader, strict=False):
        assert torch.equal(batch["image"], in_memory.batches(4, 0, 1).batch(step)["image"])


def test_unusable_images_are_named_counted_and_left_out(folder, cache, capsys):
    (folder / "a" / "7.png").write_bytes(b"no image")
    whole = (folder / "a" / "2.jpg").read_bytes()
    (folder / "a" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"1 of 7 images cannot be used, and 0 may \(a/2.jpg: (?i:.*truncated)"):
        image_folder(str(folder), 8)
    data = image_folder(str(folder), 8, max_corrupt_fraction=0.3)
    assert data.labels.tolist() == [0, 1, 1, 1, 1]
    assert "left out 2 of 7 images (a/2.jpg, a/7.png; all in" in capsys.readouterr().err
    skipped = json.loads(next(cache.glob("*/cache.json")).read_text())["skipped"]
    assert [s["name"] for s in skipped] == ["a/2.jpg", "a/7.png"]


def test_what_a_folder_is_refused_for(folder, tmp_path):
    with pytest.raises(UserError, match=r"\(a/1.png: 40x30 pixels, smaller than 32x32\).*smaller dataset.image_size"):
        image_folder(str(folder), 32)
    grey = tmp_path / "grey"
    grey.mkdir()
    picture(0, mode="L").save(grey / "1.png")
    with pytest.raises(UserError, match=r"all images are grey.*use dataset.image_channels=1"):
        image_folder(str(grey), 8)
    assert image_folder(str(grey), 8, 1).images.shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match=r"dataset.resize=nearest must be one of area, bilinear, lanczos"):
        image_folder(str(folder), 8, resize="nearest")
    with pytest.raises(UserError, match=r"holds no images"):
        image_folder(str(tmp_path / "cache"), 8)


def test_a_cache_of_another_transform_or_damaged_is_refused(folder, tmp_path):
    mine = str(tmp_path / "mine")
    image_folder(str(folder), 8, cache=mine)
    with pytest.raises(UserError, match=r"was made otherwise .*image_size 8, now 16; resize lanczos, now area"):
        image_folder(str(folder), 16, resize="area", cache=mine)
    picture(9).save(folder / "a" / "9.png")
    with pytest.raises(UserError, match=r"was made otherwise \(content [0-9a-f]+, now"):
        image_folder(str(folder), 8, cache=mine)
    (folder / "a" / "9.png").unlink()
    images = tmp_path / "mine" / "images.bin"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"images.bin is damaged: 1151 bytes instead of 1152"):
        image_folder(str(folder), 8, cache=mine)
    (tmp_path / "mine" / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache.json is damaged: it is no JSON. Delete \S+/mine to make it again"):
        image_folder(str(folder), 8, cache=mine)
    shutil.rmtree(tmp_path / "mine")  # as it says
    image_folder(str(folder), 8, cache=mine)


def test_imagenet_from_jpegs_and_from_npz_batches(tmp_path):
    for k, name in enumerate(("n01/a.JPEG", "n01/b.JPEG", "n02/c.JPEG")):
        (tmp_path / "jpegs" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k, 100 + k, 80).save(tmp_path / "jpegs" / name)
    data = imagenet64(str(tmp_path / "jpegs"))
    assert data.images.shape == (3, 3, 64, 64) and data.labels.tolist() == [0, 0, 1] and data.flips

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3 * 64 * 64), dtype=np.uint8)
    (tmp_path / "npz").mkdir()
    labels = np.array([1, 2, 1000, 1, 7])
    for k, part in enumerate((slice(0, 3), slice(3, 5))):
        np.savez(tmp_path / "npz" / f"train_data_batch_{k + 1}.npz", data=pixels[part], labels=labels[part])
    data = imagenet64(str(tmp_path / "npz"))
    assert torch.equal(data.images, torch.from_numpy(pixels).view(5, 3, 64, 64))
    assert data.labels.tolist() == [0, 1, 999, 0, 6]
    np.savez(tmp_path / "npz" / "train_data_batch_3.npz", pixels=pixels)
    with pytest.raises(UserError, match=r"batch_3.npz is no batch of Downsampled ImageNet .*labels"):
        imagenet64(str(tmp_path / "npz"))


def test_cifar10_in_its_python_version(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    with pytest.raises(UserError, match=r"CIFAR-10 is not in dataset.path=.*dataset.download=true"):
        cifar10(str(tmp_path))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 3072), dtype=np.uint8)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()

    def write(name: str, content: dict) -> list[str]:
        (root / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((root / name).read_bytes()).hexdigest()]

    parts = [write(f"data_batch_{k + 1}", {"data": pixels[k::5], "labels": [k] * len(pixels[k::5])}) for k in range(5)]
    monkeypatch.setattr(CIFAR10, "train_list", parts)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", {"data": pixels[:1], "labels": [0]})])
    name, md5 = write("batches.meta", {"label_names": [str(k) for k in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    data = cifar10(str(tmp_path))
    assert data.labels.tolist() == [0, 0, 1, 2, 3, 4]
    assert torch.equal(data.images[2], torch.from_numpy(pixels[1]).view(3, 32, 32))
    (root / "data_batch_1").write_bytes(b"half")
    monkeypatch.setattr(CIFAR10, "url", "http://localhost:9/cifar.tar.gz")
    with pytest.raises(UserError, match=r"could not be downloaded"):
        cifar10(str(tmp_path), download=True)


def test_lsun_from_its_lmdb_export(tmp_path):
    import io

    root = tmp_path / "church_outdoor_train_lmdb"
    with lmdb.open(str(root), map_size=2**24) as database, database.begin(write=True) as transaction:
        for k in range(3):
            buffer = io.BytesIO()
            picture(k, 200, 150).save(buffer, "WEBP", lossless=True)
            transaction.put(f"key{k}".encode(), buffer.getvalue())
    data = lsun(str(tmp_path), "church_outdoor")
    assert data.images.shape == (3, 3, 128, 128) and data.labels is None
    expected = picture(1, 200, 150).crop((25, 0, 175, 150)).resize((128, 128), Image.Resampling.BILINEAR)
    assert torch.equal(data.images[1], torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    with pytest.raises(UserError, match=r"holds no bedroom_train_lmdb/data.mdb"):
        lsun(str(tmp_path), "bedroom")


@pytest.fixture
def saved(tmp_path):
    """A dataset of 12 numbered images with labels, saved by the `datasets` library."""
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(num_classes=3)})
    pictures = [Image.new("RGB", (9, 9), (20 * k, 0, 0)) for k in range(12)]
    rows = {"picture": pictures, "kind": [k % 3 for k in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    return {"path": str(tmp_path / "saved"), "image_column": "picture", "label_column": "kind", "image_size": 8}


def numbers(batch: dict) -> list[int]:
    return (batch["image"][:, 0, 0, 0] // 20).tolist()


def test_huggingface_map_style(saved, folder):
    data = huggingface.load(**saved)
    assert numbers({"image": data.images}) == list(range(12)) and data.labels.tolist() == [k % 3 for k in range(12)]
    assert huggingface.load(str(folder), 8).images.shape == (6, 3, 8, 8)  # a folder of images, by its path
    with pytest.raises(UserError, match=r"dataset.image_column=photo is not a column of .*choose among picture, kind"):
        huggingface.load(**saved | {"image_column": "photo"})
    with pytest.raises(UserError, match=r"dataset.image_column=kind of .* holds no images"):
        huggingface.load(**saved | {"image_column": "kind"})
    with pytest.raises(UserError, match=r"cannot be loaded"):
        huggingface.load(str(folder) + "-absent", 8)


@pytest.mark.parametrize(("world", "workers", "batch_size"), [(1, 0, 2), (2, 2, 1), (1, 3, 2)])
def test_huggingface_stream_is_shared_without_overlap_or_loss(saved, world, workers, batch_size):
    data = huggingface.load(**saved, streaming=True, reference_images=6, shuffle_buffer=4)
    assert len(data.images) == 6 and data.num_classes == 3
    parts = world * max(1, workers)
    steps = 12 // (parts * batch_size) * max(1, workers)  # of each rank, in an epoch
    seen, by_step = [], {}
    for rank in range(world):
        loader = DataLoader(data.batches(batch_size, 0, 1, rank, world), batch_size=None, num_workers=workers)
        for step, batch in zip(range(2 * steps), loader, strict=False):
            assert batch["step"] == step and batch["label"].tolist() == [k % 3 for k in numbers(batch)]
            by_step[rank, step] = numbers(batch)
            seen += numbers(batch) if step < steps else []
    assert sorted(seen) == list(range(12))
    resumed = DataLoader(data.batches(batch_size, 0, 1, 0, world, start=1), batch_size=None, num_workers=workers)
    for step, batch in zip(range(1, 2 * steps), resumed, strict=False):
        assert batch["step"] == step and numbers(batch) == by_step[0, step]


def test_a_stream_leaves_out_few_and_refuses_many(saved, capsys):
    data = huggingface.load(**saved, streaming=True, reference_images=6)
    stream = Stream(data.stream.rows, "picture", data.stream.labels, Transform(16), 0.003, 4)
    too_large = StreamedBatches(stream, False, BatchKey(2, 0, 1))
    with pytest.raises(UserError, match=r"4 of the stream's first 4 images cannot be used .*9x9 pixels, smaller"):
        next(iter(too_large))
    assert capsys.readouterr().err.count("left out an image of the stream") == 4


def labelled(tmp_path, values, feature=None) -> dict:
    """Images with these labels, saved; the arguments that load them."""
    import datasets

    features = datasets.Features({"image": datasets.Image()} | ({"label": feature} if feature else {}))
    rows = {"image": [Image.new("RGB", (9, 9), (20 * k, 0, 0)) for k in range(len(values))], "label": values}
    dataset = datasets.Dataset.from_dict(rows, features=features if feature else None)
    dataset.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "labelled")
    return {"path": str(tmp_path / "labelled"), "label_column": "label", "image_size": 8}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, None, 1], r"holds None in row 1, which stands for no label, .*dataset.split"),
        ([0, 1, -1], r"holds -1 in row 2, which stands for no label, .*dataset.split"),
        (["a", None], r"holds .* in row"),
        ([0.5, 1.0], r"holds 0.5 in row 0: labels must be whole numbers"),
        ([0, 10**9], r"holds 1000000000 in row 1: labels must be whole numbers from 0 to 99999"),
        ([[0, 1], [1]], r"holds \[0, 1\] in row 0"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, values, message, streaming):
    options = labelled(tmp_path, values)
    with pytest.raises(UserError, match=rf"dataset.label_column=label of .*labelled {message}") as error:
        huggingface.load(**options, streaming=streaming)
    assert "\n" not in str(error.value)


def test_unlabelled_rows_of_a_class_column_are_refused(tmp_path):
    import datasets

    options = labelled(tmp_path, [0, -1, 1], datasets.ClassLabel(num_classes=2))
    with pytest.raises(UserError, match=r"dataset.label_column=label .* holds -1 in row 1"):
        huggingface.load(**options)


def test_strings_are_classes_in_the_order_of_their_names(tmp_path):
    options = labelled(tmp_path, ["dog", "cat", "emu", "cat"])
    data = huggingface.load(**options)
    assert data.labels.tolist() == [1, 0, 2, 0] and data.num_classes == 3
    with pytest.raises(UserError, match=r"holds 'dog' in row 0: .* dataset.streaming=false"):
        huggingface.load(**options, streaming=True)


def test_classes_that_no_image_has_are_counted(tmp_path):
    import datasets

    options = labelled(tmp_path, [0, 1], datasets.ClassLabel(num_classes=5))
    assert huggingface.load(**options).num_classes == huggingface.load(**options, streaming=True).num_classes == 5


def test_a_label_that_comes_late_in_a_stream_is_one_line_from_a_worker_too(tmp_path):
    data = huggingface.load(**labelled(tmp_path, [0, 1, 1, 7]), streaming=True, reference_images=3)
    assert data.num_classes == 2
    for workers in (0, 1):
        loader = DataLoader(data.batches(4, 0, 1), batch_size=None, num_workers=workers)
        with pytest.raises(StreamError) as error:
            next(iter(loader))
        assert "holds 7 in example" in str(error.value) and "from 0 to 1" in str(error.value)
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_that_changed_is_another(tmp_path, streaming):
    """Of the same shape, size, path, and split."""
    import shutil

    seen = []
    for values in ([0, 1, 2], [0, 1, 2], [2, 1, 0]):
        shutil.rmtree(tmp_path / "labelled", ignore_errors=True)
        options = labelled(tmp_path, values)
        seen.append(huggingface.load(**options, streaming=streaming))
    assert seen[0].fingerprint != seen[2].fingerprint and seen[2].labels.tolist() == [2, 1, 0]
    if not streaming:
        assert seen[0].fingerprint == seen[1].fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_edited_in_place_is_seen_through_the_library(tmp_path, monkeypatch, streaming):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for where in ("A", "B"):
        (tmp_path / where / "photos").mkdir(parents=True)
    seen = []
    for where, colour in (("A", "red"), ("A", "blue"), ("B", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / where / "photos" / "1.bmp")
        data = huggingface.load(str(tmp_path / where / "photos"), 8, streaming=streaming)
        assert data.images[0, :, 0, 0].tolist() == list(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
        seen.append(data.fingerprint)
    assert len(set(seen)) == 3


def test_an_external_image_of_a_table_is_seen_when_it_changes(tmp_path):
    """A table can hold paths alone, and its own files then stay as they were."""
    import datasets

    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "1.bmp")]}).cast_column("image", datasets.Image())
    lines = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "1.bmp")
        lines.append(list(huggingface._identity_of_rows(rows, "image")))
    assert lines[0] != lines[1]


def test_npz_batches_elsewhere_or_edited_are_others(tmp_path):
    seen = []
    for where, level in (("a", 10), ("b", 20), ("a", 30)):
        (tmp_path / where / "npz").mkdir(parents=True, exist_ok=True)
        pixels = np.full((2, 3 * 64 * 64), level, np.uint8)
        np.savez(tmp_path / where / "npz" / "train_data_batch_1.npz", data=pixels, labels=np.array([1, 2]))
        (tmp_path / where / "npz" / "._train_data_batch_1.npz").write_bytes(b"of macOS")
        data = imagenet64(str(tmp_path / where / "npz"))
        assert data.images.unique().tolist() == [level]
        seen.append(data.fingerprint)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.array([1.5, 2]), np.array([1, 1001]), np.array([[1, 2]])])
def test_npz_labels_that_are_no_classes_are_refused(tmp_path, labels):
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((2, 3 * 64 * 64), np.uint8), labels=labels)
    with pytest.raises(UserError, match=r"batch_1.npz is no batch of Downsampled ImageNet: its labels are "):
        imagenet64(str(tmp_path))


def test_lsun_elsewhere_or_edited_is_another(tmp_path):
    import io

    seen = []
    for where, colour in (("a", "red"), ("b", "green"), ("a", "blue")):
        root = tmp_path / where / "church_outdoor_train_lmdb"
        root.mkdir(parents=True, exist_ok=True)
        with lmdb.open(str(root), map_size=2**24) as database, database.begin(write=True) as transaction:
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(buffer, "BMP")
            transaction.put(b"key", buffer.getvalue())
        data = lsun(str(tmp_path / where), "church_outdoor", 16)
        assert data.images[0, :, 0, 0].tolist() == list(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
        seen.append(data.fingerprint)
    assert len(set(seen)) == 3
    (tmp_path / "b" / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"no database")
    with pytest.raises(UserError, match=r"church_outdoor_train_lmdb is damaged"):
        lsun(str(tmp_path / "b"), "church_outdoor", 16)
