"""Images in folders and zips: how their files are found, and what names their content."""

import io
import os
import stat
import string
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from pdistill.bars import bar
from pdistill.dataset.cache import Source, cached_images
from pdistill.dataset.images import ImageSet
from pdistill.dataset.pixels import BY_OTHERS, Transform, open_picture
from pdistill.dataset.settings import location, reason, shown
from pdistill.dataset.zips import opened, unpacked
from pdistill.errors import UserError
from pdistill.files import digest_of
from pdistill.reading import json_of, regular

# Endings that Pillow registers for what is no still picture, or what it can only write.
NO_PICTURES = {
    *(".bufr", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".palm", ".pdf", ".ps"),
}
# Pictures that Pillow cannot open without a plugin. They are not passed over in silence: each is an unusable image.
OTHER_PICTURES = {
    *(".avif", ".avifs", ".eps", ".exr", ".hdr", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jxr", ".svg"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2", ".emf", ".wmf", ".jp2", ".webp", ".qoi"),
}
METADATA, LABEL = "metadata.jsonl", "label"
# What systems put beside one's files; everything whose name begins with a dot is passed over as well.
OF_THE_SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@dataclass(frozen=True)
class File:
    """A picture that was found: its name below the root, the content's identity, and what is wrong with it."""

    name: str
    identity: str
    problem: str | None = None


def image_folder(
    path: str,
    image_size: int,
    image_channels: int = 3,
    *,
    prompt: str | None = None,
    flips: bool = True,
    resize: str = "lanczos",
    background: str = "white",
    max_corrupt_fraction: float = 0.001,
    cache: str | None = None,
    name: str = "image_folder",
) -> ImageSet:
    """Every image below the folder, or in the zip, `path`; sub-folders, if there are several, are its classes.

    Links are followed. Hidden files and folders are passed over, and files that are no pictures by their ending;
    pictures that cannot be opened, or are smaller than `image_size`, are left out and listed, up to the share
    `max_corrupt_fraction`. `prompt` gives every image its words, which take the place of classes: in "a photo of a
    {label}" stands the image's sub-folder, in "{text}" what metadata.jsonl in the folder says under that name, of its
    lines {"file_name": "0001.png", "text": "a red chair"}. For the rest see `Transform` and `cached_images`. Raises
    UserError for a path that does not exist or cannot be read, for dangling links to folders, where there are no
    images, and for images that the prompt has no words for.
    """
    transform = Transform(image_size, image_channels, resize, background)
    source = image_files(path, name)
    if prompt is not None:
        source = with_prompts(source, Path(path).expanduser(), prompt)
    return cached_images(source, transform, flips=flips, max_corrupt_fraction=max_corrupt_fraction, cache=cache)


def image_files(path: str | None, name: str) -> Source:
    """The images below a folder, or in a zip; class k is the k-th sub-folder by name."""
    hint = "give the images, dataset.path=<folder>"
    root = location("path", path, hint)
    try:
        mode = root.stat().st_mode
        if not stat.S_ISDIR(mode):
            regular(root)
            root.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"dataset.path={shown(path)} is not a directory or zip: {hint}") from error
    except OSError as error:
        raise UserError(f"dataset.path={shown(path)} cannot be read ({reason(error)})") from error
    find = _in_folder(root) if stat.S_ISDIR(mode) else _in_zip(root, hint)
    files, ignored, open_named = find()
    if not files:
        raise UserError(
            f"dataset.path={shown(path)} holds no images (looked for .png, .jpg, ... in it and its sub-folders, hidden "
            f"ones left out{'; ' + ignored if ignored else ''})"
        )
    folders = [str(PurePosixPath(file.name).parent) for file in files]
    classes = {folder: k for k, folder in enumerate(sorted(set(folders)))}
    labelled = len(classes) > 1

    def key_of(files: Sequence[File]) -> str:
        return digest_of([os.path.realpath(root), *(f"{file.name!r} {file.identity}" for file in files)])

    def open_image(i: int) -> Image.Image:
        if problem := files[i].problem:
            raise ValueError(problem)
        return open_named(files[i].name)

    return Source(
        f"{name}:{shown(root.resolve().name)}",
        key_of(files),
        lambda: key_of(find()[0]),
        [file.name for file in files],
        open_image,
        [classes[folder] for folder in folders] if labelled else None,
        len(classes) if labelled else None,
        note=ignored,
    )


def with_prompts(source: Source, root: Path, prompt: str) -> Source:
    """The source with a prompt for every image: equal ones are one class, in the order of their letters.

    Raises UserError for a prompt that names what there is none of, and for images without a line in metadata.jsonl.
    """
    fields = _fields_of(prompt)
    rows = _metadata(root) if fields - {LABEL} else {}
    words = []
    for name in source.names:
        known = {LABEL: PurePosixPath(name).parent.name} | rows.get(name, {})
        if missing := sorted(field for field in fields if not isinstance(known.get(field), str) or not known[field]):
            what = "lies in no sub-folder" if missing == [LABEL] else f"has no {missing[0]!r} in {METADATA}"
            raise UserError(
                f"dataset.prompt={prompt}: {shown(name)} {what}. {{label}} is an image's sub-folder, other names are "
                f'of the lines {{"file_name": "0001.png", "text": "a red chair"}} of {METADATA}'
            )
        words.append(prompt.format_map(known))
    prompts = sorted(set(words))
    index = {prompt: k for k, prompt in enumerate(prompts)}
    return replace(source, labels=[index[word] for word in words], classes=len(prompts), prompts=prompts)


def _fields_of(prompt: str) -> set[str]:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None}
    except ValueError as error:
        raise UserError(f"dataset.prompt={prompt} is no text with names in braces ({error})") from error
    if not fields or not all(field.isidentifier() for field in fields):
        raise UserError(
            f"dataset.prompt={prompt} would be the same for every image: put {{label}}, the sub-folder, or a name of "
            f"{METADATA} into it, e.g. \"dataset.prompt='a photo of a {{label}}'\""
        )
    return fields


def _metadata(root: Path) -> dict[str, dict[str, Any]]:
    """The lines of metadata.jsonl by their file_name."""
    rows: dict[str, dict[str, Any]] = {}
    file = root / METADATA
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json_of(line) if line.strip() else None
                if row is not None:
                    rows[row["file_name"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{shown(file)}, line {number}, must be {{"file_name": ..., "text": ...}} ({reason(error)})'
                ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(file)} cannot be read ({reason(error)}): dataset.prompt needs it") from error
    return rows


def _in_folder(root: Path) -> Callable[[], tuple[list[File], str, Callable[[str], Image.Image]]]:
    def find() -> tuple[list[File], str, Callable[[str], Image.Image]]:
        ignored: Counter[str] = Counter()
        found = bar(_walk(os.fspath(root), "", (), ignored), "looking for images", unit="file")
        files = sorted(found, key=lambda file: file.name)
        return files, _told(ignored), lambda name: open_picture(os.path.join(root, name))

    return find


def _walk(folder: str, above: str, ancestors: tuple[tuple[int, int], ...], ignored: Counter[str]) -> Iterator[File]:
    """The pictures in `folder`, and below. Links are followed, but for one to a folder that it lies in."""
    try:
        here = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be read ({error.strerror}): change its permissions, or move it"
        ) from error
    if (inode := (here.st_dev, here.st_ino)) in ancestors:
        return
    real = os.path.realpath(folder)
    for entry in entries:
        if is_hidden(entry.name):
            continue
        name, picture = above + entry.name, _is_picture(entry.name)
        try:
            status = entry.stat()
        except OSError as error:
            target = f"is a link to {shown(os.readlink(entry.path))}: " if entry.is_symlink() else ""
            problem = f"{target}{error.strerror}"
            if not picture:  # it may have been a folder, of who knows how many
                raise UserError(f"{shown(entry.path)}: {problem}. Fix it, or take it out") from error
            yield File(name, problem, problem)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, name + "/", (*ancestors, inode), ignored)
        elif picture:
            place = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
            yield File(name, f"{place!r} {status.st_size} {status.st_mtime_ns}", problem or _undecodable(name))
        else:
            ignored[os.path.splitext(entry.name)[1].lower()] += 1


def _in_zip(path: Path, hint: str) -> Callable[[], tuple[list[File], str, Callable[[str], Image.Image]]]:
    def find() -> tuple[list[File], str, Callable[[str], Image.Image]]:
        try:
            archive, status = opened(os.fspath(path)), path.stat()
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise UserError(f"dataset.path={shown(path)} is not a directory or zip: {hint}") from error
        ignored: Counter[str] = Counter()
        members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            name = member.filename.replace("\\", "/")  # some programs write it so
            if member.is_dir() or any(map(is_hidden, name.split("/"))):
                continue
            if _is_picture(name):
                members[name] = member
            else:
                ignored[PurePosixPath(name).suffix.lower()] += 1
        whole = f"{status.st_size} {status.st_mtime_ns}"
        files = [
            File(name, f"{whole} {members[name].file_size} {members[name].CRC}", _undecodable(name))
            for name in sorted(members)
        ]
        return files, _told(ignored), lambda name: open_picture(io.BytesIO(unpacked(archive, members[name])))

    return find


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in OF_THE_SYSTEM


def _is_decodable(suffix: str) -> bool:
    kind = Image.registered_extensions().get(suffix)
    return kind in Image.OPEN and kind not in BY_OTHERS and suffix not in NO_PICTURES


def _is_picture(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in OTHER_PICTURES or _is_decodable(suffix)


def _undecodable(name: str) -> str | None:
    suffix = os.path.splitext(name)[1].lower()
    return None if _is_decodable(suffix) else f"{suffix} cannot be decoded here, convert it to .png or .jpg"


def _told(ignored: Counter[str]) -> str:
    """The files that are no pictures, counted by their ending."""
    if not ignored:
        return ""
    endings = ", ".join(f"{n} {shown(suffix) or 'without an ending'}" for suffix, n in ignored.most_common(5))
    return f"passed over {ignored.total()} files that are no pictures ({endings}{', ...' * (len(ignored) > 5)})"
