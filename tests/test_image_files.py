"""Images as people have them: pixels of every kind, links, hidden files, names of any bytes, caches of other users."""

import json
import os
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdistill.dataset import cache as image_cache
from pdistill.dataset import image_folder
from pdistill.dataset.pixels import Transform, square_pixels
from pdistill.errors import UserError

RAMP = np.linspace(0, 255, 16).round().astype(np.uint8)[None].repeat(16, 0)  # (16, 16), 0 at the left


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def plain(path: Path, colour=(200, 30, 30), size: int = 16, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path, **options)
    return path


def pixels(folder: Path, channels: int = 1, **options) -> np.ndarray:
    """The only image of a folder, (C, 16, 16), not resized."""
    return image_folder(str(folder), 16, channels, **options).images[0].numpy()


def colours(folder: Path, size: int = 16, **options) -> list[list[int]]:
    """The colour of each image, at its centre."""
    data = image_folder(str(folder), size, 3, **options)
    return data.images[:, :, size // 2, size // 2].tolist()


# Pixels


def sixteen_bits(dtype: str) -> Image.Image:
    return Image.fromarray((RAMP.astype(np.uint32) * 257).astype(dtype))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("16-bit.png", sixteen_bits("<u2")),
        ("16-bit.tif", sixteen_bits("<u2")),
        ("big-endian.tif", sixteen_bits(">u2")),
        ("16-bit.pgm", sixteen_bits("<u2")),
        ("32-bit.tif", sixteen_bits("<i4")),
        ("float.tif", Image.fromarray(RAMP.astype(np.float32) / 255)),
    ],
)
def test_grey_of_more_than_8_bits_is_scaled(photos, name, image):
    image.save(photos / name)
    assert np.abs(pixels(photos)[0].astype(int) - RAMP).max() == 0
    with pytest.raises(UserError, match=r"all images are grey.*use dataset.image_channels=1"):
        image_folder(str(photos), 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.float32), r"float pixels from 0 to 255, whose range is not known \(0 to 1 is\)"),
        (np.full((16, 16), np.nan, np.float32), r"pixels that are not finite"),
        (RAMP.astype(np.int32), r"integer pixels from 0 to 255, whose range is not known"),
        (RAMP.astype(np.int32) * 1000, r"integer pixels from 0 to 255000, whose range is not known"),
        (RAMP.astype(np.int32) - 5, r"integer pixels from -5 to 250"),
    ],
)
def test_grey_of_an_unknown_range_is_refused(photos, values, message):
    Image.fromarray(values).save(photos / "1.tif")
    with pytest.raises(UserError, match=rf"\(1.tif: {message}"):
        image_folder(str(photos), 16, 1)


def test_white_is_zero_and_12_bits_of_tiffs(photos):
    Image.fromarray(65535 - RAMP.astype(np.uint16) * 257).save(photos / "1.tif", tiffinfo={262: 0})
    with Image.open(photos / "1.tif") as image:
        assert image.mode == "I;16" and image.tag_v2[262] == 0
    assert np.array_equal(pixels(photos)[0], RAMP)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(photos, orientation, ending):
    """Held against ImageOps.exif_transpose."""
    from PIL import ImageOps

    quarters = np.zeros((16, 16, 3), np.uint8)
    quarters[:8, :8], quarters[:8, 8:], quarters[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quarters).save(photos / f"1.{ending}", exif=exif, **({"quality": 95} if ending == "jpg" else {}))
    with Image.open(photos / f"1.{ending}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
    ours = pixels(photos, 3)
    assert np.array_equal(ours, expected)
    upright = {1: "red", 6: "blue"}.get(orientation)  # 6: the camera's top left is now at the top right
    if upright:
        assert ours[:, 3, 3].argmax() == {"red": 0, "blue": 2}[upright]


def test_damaged_exif_does_not_cost_the_image(photos):
    plain(photos / "1.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffjunk")
    assert pixels(photos, 3).shape == (3, 16, 16)


def transparent(mode: str) -> Image.Image:
    """Left half red, right half blue and invisible."""
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (8, 0, 16, 16))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("rgba.png", lambda path: transparent("RGBA").save(path)),
        ("rgba.webp", lambda path: transparent("RGBA").save(path, lossless=True)),
        ("rgba.tif", lambda path: transparent("RGBA").save(path)),
        ("palette.png", lambda path: transparent("P").save(path)),
        ("palette.gif", lambda path: transparent("RGBA").save(path)),
        (
            "one colour.png",
            lambda path: (
                Image.alpha_composite(Image.new("RGBA", (16, 16), (0, 0, 255, 255)), transparent("RGBA"))
                .convert("RGB")
                .save(path, transparency=(0, 0, 255))
            ),
        ),
    ],
)
def test_what_is_transparent_shows_the_background(photos, name, save):
    save(photos / name)
    assert pixels(photos, 3)[:, 8, 12].tolist() == [255, 255, 255]
    assert pixels(photos, 3, background="#00ff00")[:, 8, 12].tolist() == [0, 255, 0]
    assert pixels(photos, 3)[:, 8, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "PA"])
def test_modes_with_alpha_that_only_plugins_give(mode):
    image = transparent("RGBA").convert(mode) if mode != "PA" else transparent("RGBA").convert("P").convert("PA")
    if mode == "PA":
        image.putalpha(transparent("RGBA").getchannel("A"))
    ours, grey = square_pixels(image, Transform(16))
    assert ours[:, 8, 12].tolist() == [255, 255, 255] and ours[:, 8, 4].tolist() == [255, 0, 0] and not grey


@pytest.mark.parametrize(
    ("bits", "colour", "shown", "clear", "row"),
    [
        (16, 2, [255, 0, 0], (0x1234, 0, 0xFFFF), struct.pack(">24H", *(65535, 0, 0) * 8)),
        (4, 0, [255] * 3, (5,), b"\xff" * 4),
        (2, 0, [255] * 3, (1,), b"\xff" * 2),
    ],
)
def test_the_transparent_colour_of_a_png_that_is_not_of_8_bits(photos, bits, colour, shown, clear, row):
    """Written by hand, as Pillow cannot: the left half is opaque, the right half of the transparent colour."""

    def block(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    right = struct.pack(">24H", *clear * 8) if bits == 16 else bytes([{4: 0x55, 2: 0b01010101}[bits]]) * len(row)
    content = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, colour, 0, 0, 0)),
        (b"tRNS", struct.pack(f">{len(clear)}H", *clear)),
        (b"IDAT", zlib.compress((b"\0" + row + right) * 16)),
        (b"IEND", b""),
    ]
    (photos / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(block(*part) for part in content))
    plain(photos / "2.png")  # colours
    first = image_folder(str(photos), 16, background="lime").images[0]
    assert first[:, 8, 4].tolist() == shown and first[:, 8, 12].tolist() == [0, 255, 0]


@pytest.mark.parametrize("deep", [False, True])
def test_transparent_grey_shows_the_background(photos, deep):
    if deep:  # 16 bits, of which one level is transparent
        sixteen_bits("<u2").save(photos / "1.png", transparency=0)
    else:
        Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray((RAMP > 0).astype(np.uint8) * 255)]).save(
            photos / "1.png"
        )
    expected = np.where(RAMP == 0, 255, RAMP)
    assert np.array_equal(pixels(photos)[0], expected)
    assert np.array_equal(pixels(photos, background="black")[0], RAMP)
    with pytest.raises(UserError, match="all images are grey"):
        image_folder(str(photos), 16)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX", "I;16B"])
def test_every_mode_of_pillow_keeps_its_ramp(photos, mode):
    if mode == "LAB":
        from PIL import ImageCms

        grey = Image.fromarray(RAMP).convert("RGB")
        image = ImageCms.profileToProfile(
            grey, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif mode == "I;16B":
        image = sixteen_bits(">u2")
    else:
        image = Image.fromarray(RAMP).convert("RGB")
        image = image.quantize(16) if mode == "P" else image.convert(mode)
    image.save(photos / "1.tif", **({"compression": "jpeg"} if mode == "YCbCr" else {}))
    ours = pixels(photos)[0].astype(int)
    expected = (RAMP > 127) * 255 if mode == "1" else RAMP.astype(int)
    assert np.abs(ours - expected).mean() < (3 if mode != "1" else 130)
    assert ours[:, 0].max() <= 5 and ours[:, -1].min() >= 250


def test_the_first_frame_of_an_animation(photos):
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    frames[0].save(photos / "1.gif", save_all=True, append_images=frames[1:])
    frames[0].save(photos / "2.png", save_all=True, append_images=frames[1:])
    frames[0].save(photos / "3.tif", save_all=True, append_images=frames[1:])
    assert colours(photos) == [[255, 0, 0]] * 3


def test_a_grey_palette_is_grey(photos):
    image = Image.fromarray(RAMP).convert("RGB").quantize(16)
    image.save(photos / "1.png")
    assert Image.open(photos / "1.png").mode == "P"
    with pytest.raises(UserError, match="all images are grey"):
        image_folder(str(photos), 16)


# Identity


def test_equal_names_and_sizes_elsewhere_are_other_images(tmp_path):
    for where, colour in (("A", (255, 0, 0)), ("B", (0, 0, 255))):
        plain(tmp_path / where / "photos" / "1.bmp", colour)
    red, blue = (image_folder(str(tmp_path / where / "photos"), 16) for where in "AB")
    assert red.images[0, :, 0, 0].tolist() == [255, 0, 0] and blue.images[0, :, 0, 0].tolist() == [0, 0, 255]
    assert red.fingerprint != blue.fingerprint
    mine = str(tmp_path / "mine")
    image_folder(str(tmp_path / "A" / "photos"), 16, cache=mine)
    with pytest.raises(UserError, match="was made otherwise"):
        image_folder(str(tmp_path / "B" / "photos"), 16, cache=mine)


@pytest.mark.parametrize("zipped", [False, True])
def test_an_image_edited_in_place_is_seen(photos, tmp_path, zipped):
    path = photos
    for colour in ((255, 0, 0), (0, 0, 255)):
        image = plain(photos / "1.bmp", colour)
        if zipped:
            path = tmp_path / "photos.zip"
            with zipfile.ZipFile(path, "w") as file:
                file.write(image, "1.bmp")
        assert colours(path) == [list(colour)]


def test_a_link_that_points_elsewhere_is_seen(photos, tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        plain(tmp_path / name / "1.bmp", colour)
        os.utime(tmp_path / name / "1.bmp", (1, 1))
        (photos / "class").unlink(missing_ok=True)
        (photos / "class").symlink_to(tmp_path / name)
        assert colours(photos) == [list(colour)]


def test_images_that_change_while_they_are_cached_are_refused(photos, monkeypatch, cache):
    plain(photos / "1.png")
    real = image_cache.square_pixels

    def adds(image, transform):
        plain(photos / "2.png")
        return real(image, transform)

    monkeypatch.setattr(image_cache, "square_pixels", adds)
    for mine in (None, str(cache.parent / "mine")):
        (photos / "2.png").unlink(missing_ok=True)
        with pytest.raises(UserError, match="the images changed while they were being cached"):
            image_folder(str(photos), 16, cache=mine)
    monkeypatch.setattr(image_cache, "square_pixels", real)
    assert len(image_folder(str(photos), 16, cache=str(cache.parent / "mine")).images) == 2


def stopped_after_one(photos, monkeypatch, tmp_path) -> Path:
    """The cache of two images whose making was interrupted when one was in it."""
    real, seen = image_cache.square_pixels, []

    def stops(image, transform):
        seen.append(image)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return real(image, transform)

    plain(photos / "1.png"), plain(photos / "2.png")
    monkeypatch.setattr(image_cache, "CHUNK", 1)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "square_pixels", stops)
        with pytest.raises(KeyboardInterrupt):
            image_folder(str(photos), 16, cache=str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_images_added_between_stop_and_resume_are_not_mixed_in(photos, monkeypatch, tmp_path):
    mine = str(stopped_after_one(photos, monkeypatch, tmp_path))
    plain(photos / "0.png")
    with pytest.raises(UserError, match="was made otherwise"):
        image_folder(str(photos), 16, cache=mine)


def test_a_cache_whose_bytes_changed_is_refused_and_a_copy_is_not(photos, tmp_path):
    plain(photos / "1.png")
    mine = tmp_path / "mine"
    data = image_folder(str(photos), 16, cache=str(mine))
    os.utime(mine / "images.bin")  # as after a copy
    assert image_folder(str(photos), 16, cache=str(mine)).fingerprint == data.fingerprint
    content = bytearray((mine / "images.bin").read_bytes())
    content[0] ^= 1
    (mine / "images.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"images.bin is damaged: its content is not what was written"):
        image_folder(str(photos), 16, cache=str(mine))


def test_files_that_are_not_a_cache_are_not_overwritten(photos, tmp_path):
    plain(photos / "1.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "images.bin").write_text("precious")
    with pytest.raises(UserError, match="no cache of pdistill's"):
        image_folder(str(photos), 16, cache=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "images.bin").read_text() == "precious"


# Finding files


def test_links_to_folders_and_files_are_followed_but_not_in_circles(photos, tmp_path):
    plain(tmp_path / "cats" / "1.png", (255, 0, 0))
    plain(tmp_path / "single.png", (0, 255, 0))
    plain(photos / "dog" / "1.png", (0, 0, 255))
    (photos / "cat").symlink_to(tmp_path / "cats")
    (photos / "dog" / "2.png").symlink_to(tmp_path / "single.png")
    (photos / "dog" / "round").symlink_to(photos)
    (tmp_path / "cats" / "self").symlink_to(".")
    data = image_folder(str(photos), 16)
    assert data.labels.tolist() == [0, 1, 1] and data.num_classes == 2
    assert data.images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 255, 0]]


def test_dangling_links_are_named(photos):
    plain(photos / "1.png")
    (photos / "2.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"\(2.png: is a link to gone.png: No such file"):
        image_folder(str(photos), 16)
    assert len(image_folder(str(photos), 16, max_corrupt_fraction=0.5).images) == 1
    (photos / "3.png").symlink_to("3.png")
    with pytest.raises(UserError, match=r"3.png: is a link to 3.png: Too many levels"):
        image_folder(str(photos), 16, max_corrupt_fraction=0.4)
    (photos / "cat").symlink_to("/gone/cats")
    with pytest.raises(UserError, match=r"photos/cat: is a link to /gone/cats: No such file"):
        image_folder(str(photos), 16, max_corrupt_fraction=1.0)


@pytest.mark.parametrize("zipped", [False, True])
def test_hidden_files_and_what_is_no_picture_are_passed_over(photos, tmp_path, zipped, capsys):
    for name in ("cat/1.png", "dog/2.png", ".ipynb_checkpoints/1.png", "cat/.hidden/3.png", "__MACOSX/cat/1.png"):
        plain(photos / name)
    for name in ("._1.png", "cat/._1.png", "cat/.DS_Store", "cat/Thumbs.db", "clip.mpg", "notes.txt", "x.pdf", "none"):
        (photos / name).write_bytes(b"no image")
    path = photos
    if zipped:
        path = tmp_path / "photos.zip"
        with zipfile.ZipFile(path, "w") as file:
            for found in sorted(photos.rglob("*")):
                file.write(found, found.relative_to(photos))
    data = image_folder(str(path), 16)
    assert data.labels.tolist() == [0, 1]
    said = capsys.readouterr().err
    assert "passed over 5 files that are no pictures" in said and "1 .mpg" in said and ".DS_Store" not in said


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", [".heic", ".HEIF", ".jxl", ".svg", ".cr2"])
def test_pictures_of_formats_that_cannot_be_opened_are_named(photos, tmp_path, ending, zipped):
    plain(photos / "1.png")
    (photos / f"2{ending}").write_bytes(b"anything")
    path = photos
    if zipped:
        path = tmp_path / "photos.zip"
        with zipfile.ZipFile(path, "w") as file:
            [file.write(photos / name, name) for name in ("1.png", f"2{ending}")]
    with pytest.raises(
        UserError, match=rf"1 of 2 images cannot be used.*2{ending}: {ending.lower()} cannot be decoded"
    ):
        image_folder(str(path), 16)
    assert len(image_folder(str(path), 16, max_corrupt_fraction=0.5).images) == 1


def test_what_is_no_regular_file_does_not_hang(photos):
    plain(photos / "1.png")
    os.mkfifo(photos / "2.png")
    with pytest.raises(UserError, match=r"2.png: not a regular file"):
        image_folder(str(photos), 16)


def test_names_that_are_not_utf8_or_not_one_line(photos, capsys):
    latin = os.fsdecode(b"caf\xe9.png")
    plain(photos / latin, (255, 0, 0)), plain(photos / "a\nb.png", (0, 0, 255))
    assert colours(photos) == [[0, 0, 255], [255, 0, 0]]
    (photos / latin).write_bytes(b"no image")
    (photos / "a\nb.png").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        image_folder(str(photos), 16)
    assert r"a\nb.png: is no image" in str(error.value) and "\n" not in str(error.value)
    (photos / "a\nb.png").unlink()
    with pytest.raises(UserError) as error:
        image_folder(str(photos), 16)
    assert r"caf\xe9.png: is no image" in str(error.value) and str(error.value).encode()
    plain(photos / "good.png")
    assert len(image_folder(str(photos), 16, max_corrupt_fraction=0.5).images) == 1
    assert r"caf\xe9.png" in capsys.readouterr().err


def test_a_folder_whose_own_name_is_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ph\xf6tos"))
    plain(folder / "1.png")
    assert len(image_folder(str(folder), 16).images) == 1


def test_a_zip_written_with_backslashes_keeps_its_classes(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for name in ("cat", "dog"):
            info = zipfile.ZipInfo(f"{name}/1.png")
            info.filename = f"{name}\\1.png"
            file.writestr(info, plain(photos / name / "1.png").read_bytes())
    assert image_folder(str(tmp_path / "photos.zip"), 16).labels.tolist() == [0, 1]


# Places


def test_home_is_expanded(photos, tmp_path, monkeypatch):
    plain(photos / "1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder("~/photos", 16, cache="~/mine")
    assert (tmp_path / "mine" / "cache.json").exists()
    with pytest.raises(UserError, match=r"dataset.path=~nobody-of-that-name/x: there is no such home directory"):
        image_folder("~nobody-of-that-name/x", 16)


def test_without_a_home_directory(photos, tmp_path, monkeypatch):
    plain(photos / "1.png")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    image_folder(str(photos), 16)
    monkeypatch.delenv("PDISTILL_CACHE")
    with pytest.raises(UserError, match="PDISTILL_CACHE"):
        image_folder(str(photos), 16)
    image_folder(str(photos), 16, cache=str(tmp_path / "mine"))


@pytest.fixture
def nobody():
    """A directory that anyone may enter, and a way of being someone else there."""
    if os.geteuid():
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)

        class Nobody:
            root = Path(directory)

            def __enter__(self):
                os.seteuid(65534)

            def __exit__(self, *_):
                os.seteuid(0)

        yield Nobody()


def test_a_complete_cache_of_another_user_is_read(nobody, monkeypatch):
    monkeypatch.setenv("PDISTILL_CACHE", str(nobody.root / "cache"))
    plain(nobody.root / "photos" / "1.png")
    data = image_folder(str(nobody.root / "photos"), 16)
    for path in [nobody.root / "cache", *(nobody.root / "cache").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with nobody:
        again = image_folder(str(nobody.root / "photos"), 16)
        assert torch.equal(again.images, data.images)
        with pytest.raises(UserError, match=r"the cache .* cannot be used .*Permission denied.*dataset.cache="):
            image_folder(str(nobody.root / "photos"), 8)


def test_what_may_not_be_read_is_named(nobody, monkeypatch):
    folder = nobody.root / "photos"
    plain(folder / "1.png")
    plain(folder / "2.png").chmod(0)
    (nobody.root / "mine").mkdir(0o777)
    (nobody.root / "mine").chmod(0o777)
    with nobody, pytest.raises(UserError, match=r"2.png: \[Errno 13\] Permission denied"):
        image_folder(str(folder), 16, cache=str(nobody.root / "mine"))
    plain(folder / "cat" / "1.png")
    (folder / "cat").chmod(0)
    with nobody, pytest.raises(UserError, match=r"photos/cat cannot be read \(Permission denied\)"):
        image_folder(str(folder), 16)
    folder.chmod(0)
    with nobody, pytest.raises(UserError, match=r"photos cannot be read"):
        image_folder(str(folder), 16)
    archive = nobody.root / "photos.zip"
    archive.touch(0)
    with nobody, pytest.raises(UserError, match=r"photos.zip cannot be read .*Permission denied"):
        image_folder(str(archive), 16)


def test_a_place_where_no_cache_can_be(photos, tmp_path, monkeypatch):
    plain(photos / "1.png")
    (tmp_path / "file").touch()
    for options in ({"cache": str(tmp_path / "file")}, {"cache": str(tmp_path / "file" / "below")}):
        with pytest.raises(UserError, match=r"the cache .*/file.* cannot be used .*dataset.cache=<directory>"):
            image_folder(str(photos), 16, **options)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.os, "fsync", full)
    with pytest.raises(UserError, match=r"the cache .* cannot be used .*No space left"):
        image_folder(str(photos), 16)


def test_a_cache_that_lost_its_last_bytes_is_begun_anew(photos, monkeypatch, tmp_path):
    """As after a power failure: the note of progress is there, and the images before it are not."""
    mine = stopped_after_one(photos, monkeypatch, tmp_path)
    assert json.loads((mine / "progress.json").read_text())["kept"] == 1
    (mine / "images.bin").write_bytes(b"")
    assert colours(photos, cache=str(mine)) == [[200, 30, 30]] * 2
