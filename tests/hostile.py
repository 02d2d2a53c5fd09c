"""Hostile content for everything that the project reads: what is read, and how its files are changed.

`python tests/hostile.py <reader> <inputs> <seed>` tries one reader in this process, with its memory limited, and
prints counts as JSON; `tests/test_hostile.py` runs all of them.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import lmdb
import msgpack
import numpy as np
import torch
import yaml
from finished_runs import evaluated, make_run, write_evaluation
from PIL import Image
from safetensors.torch import save_file

from pdistill.commands import complaints
from pdistill.dataset import image_folder, imagenet64, lsun
from pdistill.dataset.columns import Labels, decode
from pdistill.dataset.folders import image_files, with_prompts
from pdistill.dataset.pixels import Transform, open_picture, square_pixels
from pdistill.errors import UserError
from pdistill.files import read_json

SECONDS = 30  # that one input may take, on a busy machine
GIB = 1024**3
ALLOWED = (UserError, OSError)  # what the command line tells in one line
DATA = Path(__file__).parent / "data"

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Reader:
    """One thing that is read: `make(folder)` writes good files, `read(folder)` reads them."""

    make: Callable[[Path], None]
    read: Read
    slow: bool = False
    """Too slow for more than the long test."""
    weight: float = 1.0
    """Share of the inputs of the long test."""


class Planted:
    """A pickle that makes a file where it runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


# ---- how files are changed

HUGE = [2**31, 2**63, 10**12, -(10**12), 10**90, 10**400]
NUMBERS = [0, 1, -1, 3, 64, 1000, 1.5, -0.0, float("nan"), float("inf"), float("-inf"), 1e-320, 1e308, *HUGE]
TEXTS = [
    "",
    "x",
    "teacher",
    "unet",
    "../../../../etc/passwd",
    "/dev/zero",
    "\x00",
    "\ud800",
    "\x1b]0;owned\x07\x1b[2J",
    "a\nb\r\nc",
    "<script>alert(1)</script>",
    "![x](http://x/y)|`",
    "[/red][link=x]",
    "$\\frac{$",
    "${oc.env:HOME}",
    "${run_name:}",
    "!!python/object/apply:os.system [x]",
    "os.system",
    "=1+1",
    "{0.__class__}",
    "²",
    "x" * 5000,
]
NAMED = [{"_target_": "os.system", "command": "x"}, ["os", "system"], {"name": "os.system"}, {"__class__": "x"}]
NESTED: list[Any] = [[], {}, [[]], [None], [1] * 300, {"x": {"x": {}}}, json.loads("[" * 90 + "]" * 90)]
VALUES: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *NAMED, *NESTED]


def places_of(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested dicts and lists."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                left.append(node[key])
    return found


def change(random: Random, tree: Any) -> Any:
    """The tree with one to three values replaced, taken out, moved or added."""
    tree = {"": tree}
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        container, key = random.choice(places_of(tree))
        what = random.random()
        if what < 0.75:
            container[key] = copy.deepcopy(random.choice(VALUES))  # which a later change may change
        elif what < 0.85 and container is not tree:
            del container[key]
        elif what < 0.95:
            other, at = random.choice(places_of(tree))
            container[key] = json.loads(json.dumps(other[at])) if isinstance(container, dict | list) else None
        elif isinstance(container[key], dict):
            container[key][random.choice(["_target_", "auto_map", "_module", "", "x"])] = copy.deepcopy(
                random.choice(VALUES)
            )
    return tree.get("")


def change_bytes(random: Random, content: bytes) -> bytes:
    """The content with some bytes changed, taken out, doubled or added, or cut off."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        at = random.randrange(len(data) + 1)
        what = random.random()
        if what < 0.4 and at < len(data):
            data[at] = random.randrange(256)
        elif what < 0.6:
            size = random.choice([1, 2, 4, 8])
            number = random.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1])
            packed = number.to_bytes(8, random.choice(["little", "big"]))
            data[at : at + size] = packed[:size]
        elif what < 0.7:
            del data[at:]
        elif what < 0.8:
            del data[at : at + random.choice([1, 8, 100])]
        elif what < 0.9:
            part = data[at : at + random.choice([1, 16, 200])]
            data[at:at] = part * random.choice([1, 2, 30])
        else:
            data[at:at] = random.choice([b"[", b"{", b'"', b"\0", b"\xff", b"*a", b"\x1b[", b"<!--"])
    return bytes(data)


def change_safetensors(random: Random, content: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(change(random, json.loads(content[8 : 8 + size]))).encode()
    claimed = random.choice([len(header)] * 4 + [0, 1, len(header) + 1, 10**8, 2**63, 2**64 - 1])
    return struct.pack("<Q", claimed) + header + content[8 + size :]


def change_msgpack(random: Random, content: bytes) -> bytes:
    tree = msgpack.unpackb(content, strict_map_key=False)
    changed = change_extensions(random, tree) if random.random() < 0.5 else change(random, tree)
    return msgpack.packb(changed, unicode_errors="surrogatepass")


def change_extensions(random: Random, tree: Any) -> Any:
    """Other shapes, types and codes of arrays."""
    arrays = [(c, k) for c, k in places_of(tree) if isinstance(c[k], msgpack.ExtType)]
    container, key = random.choice(arrays)
    shape, dtype, data = msgpack.unpackb(container[key].data)
    shape = random.choice([shape, [], [-1], [2**40], [0], shape[::-1], "x", [[1]], [1.5], [*shape, 1]])
    dtype = random.choice([dtype, "object", "O8", "float64", "int8", "V4", "x", 3, None, ["f4", "f4"]])
    data = random.choice([data, b"", data[:-1], pickle.dumps([1]), None])
    code = random.choice([container[key].code, 0, 2, 3, 127])
    container[key] = msgpack.ExtType(code, msgpack.packb([shape, dtype, data]))
    return tree


def change_zip(random: Random, content: bytes) -> bytes:
    """Other names, methods and contents of members: above all of the headers of arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(out, "w") as after:
        for member in before.infolist():
            data, name = before.read(member), member.filename
            what = random.random()
            if what < 0.5:
                data = change_bytes(random, data[:128]) + data[128:]
            elif what < 0.6:
                name = random.choice(
                    ["../../x.png", "/etc/x.png", "a\\b.png", "\x1b.png", f"{name}/x.png", "a//./b.png"]
                )
            elif what < 0.7:
                name += random.choice([".png", "/", "\x00x.png"])
            after.writestr(name, data, random.choice([0, 8, 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    return out.getvalue()


def change_text(random: Random, content: bytes) -> bytes:
    return json.dumps(change(random, json.loads(content))).encode()


def change_lines(random: Random, content: bytes) -> bytes:
    return b"\n".join(change_text(random, line) for line in content.splitlines())


def change_yaml(random: Random, content: bytes) -> bytes:
    return yaml.safe_dump(change(random, yaml.safe_load(content))).encode("utf-8", "surrogatepass")


BY_KIND = {".json": change_text, ".jsonl": change_lines, ".yaml": change_yaml, ".safetensors": change_safetensors}
BY_KIND |= {".flax": change_msgpack, ".zip": change_zip, ".npz": change_zip}


def mutate(random: Random, file: Path) -> None:
    """Changes one file by its kind, or, every fourth time and where that does not work, as bytes."""
    content = file.read_bytes()
    changed = None
    if random.random() > 0.25 and file.suffix in BY_KIND:
        with contextlib.suppress(Exception):
            changed = BY_KIND[file.suffix](random, content)
    file.write_bytes(change_bytes(random, content) if changed is None else changed)


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


# ---- what is read


def make_json(folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps({"a": [1, 2.5, None], "b": {"c": "text"}, "d": True}))


def small(channels: int = 1, width: int = 32) -> Any:
    from pdistill import Denoiser
    from pdistill.network import unet
    from pdistill.parameterization import V
    from pdistill.schedule import CosineSchedule

    torch.manual_seed(0)
    network = unet(8, channels, channels, width, 32, [1, 1], 1, [4])
    return Denoiser(network, V(), CosineSchedule(), 4, ["teacher", 4]).eval()


def make_run_of_two(folder: Path) -> None:
    run = make_run("run", {"teacher": 5.0, "steps-0004": 6.0}, root=folder, made={"version": "0.2.0", "data": "d"})
    rows = [evaluated(run, "teacher, ddim", 8, 4.0), evaluated(run, "distilled", 4, 5.0)]
    write_evaluation(run, [*rows, evaluated(run, "real images", None, 1.0)])
    (run / "csv" / "version_0").mkdir(parents=True)
    lines = ["step,teacher/loss,steps_0004/loss", "1,0.5,", "2,0.4,", "3,,0.3"]
    (run / "csv" / "version_0" / "metrics.csv").write_text("\n".join(lines))
    (run / "run.json").write_text(json.dumps({"version": "0.2.0", "choices": {"dataset": "digits"}, "overrides": []}))


def read_tables(folder: Path) -> None:
    """Everything of a run but the plots."""
    from pdistill.commands.run_directory import facts_of, last_metric
    from pdistill.report import tables
    from pdistill.report.runs import curves_of, evaluation_of, losses_of, rows_of

    run = folder / "run"
    rows = rows_of(run)
    words = [tables.stages(rows), tables.cost(rows)] if rows else []
    evaluation = evaluation_of(run)
    if evaluation:
        headings, lines, notes = tables.cells(evaluation)
        words.append((headings, lines))
        tables.curves(evaluation)
        list(map(tables.plain, notes))
    for headings, lines in words:
        text = "\n".join(tables.markdown(headings, lines))
        assert "<script" not in text and "\x1b" not in text and "](http" not in text
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=200, color_system=None).print(tables.terminal(headings, lines, "x"))
        assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    tables.stage_notes(rows)
    tables.provenance(rows)
    curves_of(run)
    losses_of(run)
    facts_of(run)
    last_metric(run)


def read_page(folder: Path) -> None:
    from pdistill.report import page, plots
    from pdistill.report.runs import rows_of

    run = folder / "run"
    page.write([run], folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "<script>alert" not in text and text.count("<script") == 1
    plots.comparison_sheet(run, rows_of(run))


def read_sweep(folder: Path) -> None:
    from pdistill.commands import sweep
    from pdistill.commands.contenders import dataset_of_run
    from pdistill.commands.run_directory import config_of, facts_of
    from pdistill.report.choices import Made, tell_apart

    run = folder / "run"
    config = config_of(run)
    assert "/root" not in json.dumps(config, default=str) or "HOME" not in json.dumps(config, default=str)
    tell_apart([Made(config, facts_of(run)), Made({"a": 1}, {})])
    with contextlib.chdir(folder):
        sweep._rows(sweep.collect([str(run)]))
    config["dataset"] = config.get("dataset")
    dataset_of_run(run)


def make_wandb(folder: Path) -> None:
    row = {"steps_0004/fid": 3.0, "steps_0004/num_steps": 4, "teacher/fid": 2.0, "teacher/num_steps": 8}
    summary = row | {"provenance": {"extractor": "classifier", "num_samples": 10}}
    config = {"parameterization": {"_target_": "x.Y"}, "steps": {"plan": [8, 4]}, "teacher": None, "seed": 0}
    run = {"name": "first", "state": "finished", "config": config, "summary": summary}
    (folder / "run.json").write_text(json.dumps(run))


def read_wandb(folder: Path) -> None:
    from pdistill.commands import sweep
    from pdistill.report.choices import Made, tell_apart

    told = read_json(folder / "run.json")
    kinds = {"name": str, "state": str, "config": dict, "summary": dict}
    if not isinstance(told, dict) or not all(isinstance(told.get(k), kind) for k, kind in kinds.items()):
        return  # wandb's own objects have these
    found = sweep._of_wandb(SimpleNamespace(**told))
    (choices,) = tell_apart([Made(found.config, {})]) if found.config else [{}]
    job = sweep.Job(found.name, choices, found.error, None, found.elsewhere)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        sweep.finish([job, job])
    assert "\x1b" not in out.getvalue()
    outside = [file for file in folder.rglob("ablation.md") if file.parent.parent != folder / "outputs"]
    assert not outside and len(list((folder / "outputs").rglob("ablation.md"))) == 1


def make_results(folder: Path) -> None:
    result = {"name": "a", "output_root": "outputs", "error": None, "groups": {"dataset": "digits"}, "choices": {}}
    (folder / "00000.json").write_text(json.dumps(result | {"value": 1.0}))


def read_results(folder: Path) -> None:
    from pdistill.commands import sweep

    with contextlib.chdir(folder):
        job = sweep.results_in(folder)
        assert all(j.place.name not in ("", "..") for j in job)


def make_denoiser(folder: Path) -> None:
    small().save(folder / "denoiser")


def read_denoiser(folder: Path) -> None:
    from pdistill import Denoiser
    from pdistill.report import card

    denoiser = Denoiser.load(folder / "denoiser")
    model = card.Model(denoiser, folder / "denoiser", None, {})
    text = str(card.make(model, "me/name"))
    assert "<script" not in text.partition("---\n\n")[2]


def make_diffusers(folder: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
    network = diffusers.UNet2DModel(8, 1, 1, **kinds, **sizes)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder / "model")


def read_teacher(folder: Path) -> None:
    from pdistill import load_diffusers_teacher
    from pdistill.commands.recipe import _configs

    _configs(str(folder / "model"), None)
    load_diffusers_teacher(folder / "model")


def read_pipeline(folder: Path) -> None:
    from pdistill.interop.diffusers import Pipeline

    Pipeline.load(folder / "model")


def make_text(folder: Path) -> None:
    import test_text

    test_text.write_teacher(folder / "model", "v_prediction")


def read_text(folder: Path) -> None:
    from pdistill import load_diffusers_teacher

    teacher: Any = load_diffusers_teacher(folder / "model")
    assert teacher.pixel_shape
    teacher.codec.embed(["one"])
    teacher.codec.decode(torch.zeros(1, *teacher.image_shape))


def make_flax(folder: Path) -> None:
    shutil.copyfile(DATA / "official_unet_x.flax", folder / "cifar_8.flax")


def read_flax(folder: Path) -> None:
    from pdistill import load_official_checkpoint

    load_official_checkpoint(folder / "cifar_8.flax", 8)


def read_checkpoint(folder: Path) -> None:
    from pdistill.training.checkpoint import WholeCheckpoints

    WholeCheckpoints().load_checkpoint(folder / "last.ckpt")


def make_checkpoint(folder: Path) -> None:
    weights = {"a": torch.randn(3, 4), "b": torch.zeros(2)}
    state = {"state_dict": weights, "loops": {}, "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}]}
    torch.save(state | {"global_step": 3, "pdistill": {"version": "0.2.0"}}, folder / "last.ckpt")


def make_pictures(folder: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (12, 13, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".tiff", ".webp", ".ico", ".ppm", ".tga"):
        Image.fromarray(pixels).save(folder / f"x{suffix}")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "grey.png")
    Image.fromarray(pixels[..., 0]).convert("P").save(folder / "palette.png", transparency=3)
    Image.fromarray(random.random((9, 9)).astype(np.float32)).save(folder / "float.tiff")


def read_pictures(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        with contextlib.suppress(Exception), open_picture(file) as image:  # the cache counts them as unusable
            square_pixels(image, Transform(8))


def read_folder(folder: Path) -> None:
    image_folder(str(folder), 8, max_corrupt_fraction=1.0)


def make_zip(folder: Path) -> None:
    make_pictures(folder)
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x.png", "x.jpg", "grey.png"):
            archive.write(folder / name, f"a/{name}")
    for file in folder.iterdir():
        if file.suffix != ".zip":
            file.unlink()


def read_zip(folder: Path) -> None:
    image_folder(str(folder / "x.zip"), 8, max_corrupt_fraction=1.0)


def make_cache(folder: Path) -> None:
    make_zip(folder)
    image_folder(str(folder / "x.zip"), 8, cache=str(folder / "cached"))
    made = json.loads((folder / "cached" / "cache.json").read_text())
    (folder / "half").mkdir()
    progress = {"made_by": made["made_by"], "done": 1, "kept": 1, "grey": 0, "pixels": "0" * 64, "skipped": []}
    (folder / "half" / "progress.json").write_text(json.dumps(progress))
    (folder / "half" / "images.bin").write_bytes(bytes(192))


def read_cache(folder: Path) -> None:
    for cache in ("cached", "half"):
        with contextlib.suppress(*ALLOWED, ValueError, RecursionError):
            made = folder / cache / ("cache.json" if cache == "cached" else "progress.json")
            # The zip lies elsewhere now, and so has another identity: what it was made from stays the question.
            content = json.loads(made.read_text()) if made.is_file() else None  # no device without an end
            known = isinstance(content, dict) and isinstance(content.get("made_by"), dict)
            if known and "content" in content["made_by"]:
                content["made_by"]["content"] = image_files(str(folder / "x.zip"), "image_folder").key
                made.write_text(json.dumps(content))
        with contextlib.suppress(*ALLOWED):
            image_folder(str(folder / "x.zip"), 8, cache=str(folder / cache))


def make_npz(folder: Path) -> None:
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (3, 3 * 64 * 64), dtype=np.uint8)
    np.savez_compressed(folder / "train_data_batch_1.npz", data=data, labels=np.array([1, 2, 1000]))


def read_npz(folder: Path) -> None:
    imagenet64(str(folder), max_corrupt_fraction=1.0)


def make_lmdb(folder: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(out, "PNG")
    database = lmdb.open(str(folder / "cat_train_lmdb"), map_size=2**20, subdir=True, lock=False)
    with database, database.begin(write=True) as transaction:
        for k in range(40):
            transaction.put(f"key {k:04d}".encode(), out.getvalue())


def read_lmdb(folder: Path) -> None:
    lsun(str(folder), "cat", 8, max_corrupt_fraction=1.0)


def make_prompts(folder: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(folder / "1.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "a red chair"}))


def read_prompts(folder: Path) -> None:
    with_prompts(image_files(str(folder), "x"), folder, "{text}")


def make_latents(folder: Path) -> None:
    from pdistill.dataset import latents

    latents.table(folder / "table", 130, lambda rows: torch.ones(rows.stop - rows.start, 2, 3), "x")


read_latents = make_latents  # which makes again, and goes on with, what is not there


def make_caches(folder: Path) -> None:
    from pdistill.dataset import samples as teacher_samples
    from pdistill.metrics import classifier

    extractor = classifier.Classifier(1, 10, 4)
    save_file(extractor.state_dict(), folder / "classifier.safetensors")
    tensors = {"mean": torch.zeros(8), "covariance": torch.eye(8), "features": torch.zeros(3, 8)}
    save_file(tensors, folder / "reference.safetensors")
    np.save(folder / "00000.npy", np.zeros((teacher_samples.CHUNK, 1, 2, 2), np.uint8))


def read_caches(folder: Path) -> None:
    from pdistill.dataset import samples as teacher_samples
    from pdistill.metrics import classifier, reference

    like = classifier.Classifier(1, 10, 4)
    weights = classifier._load(folder / "classifier.safetensors", like.state_dict())
    if weights is not None:
        like.load_state_dict(weights)
    found = reference._read(folder / "reference.safetensors", True, 8)
    assert found is None or found.covariance.shape == (8, 8)
    drawn = teacher_samples._read(folder / "00000.npy", (1, 2, 2))
    assert drawn is None or drawn.shape == (teacher_samples.CHUNK, 1, 2, 2)


def make_rows(folder: Path) -> None:
    row = {"image": {"bytes": None, "path": "x.png"}, "label": 3}
    (folder / "rows.json").write_text(
        json.dumps([row, {"image": {"bytes": None, "path": "ssh://x::hf://y"}, "label": 1}])
    )


def read_rows(folder: Path) -> None:
    """A row of a `datasets` table has a dict or nothing as its image, of bytes and a path."""
    rows = read_json(folder / "rows.json")
    for row in rows if isinstance(rows, list) else []:
        image = row.get("image") if isinstance(row, dict) else None
        if isinstance(image, dict) and isinstance(image.get("path"), str):
            with contextlib.suppress(Exception):  # counted as unusable
                decode({"bytes": None, "path": image["path"]})
        Labels("label", "x", None).index(row.get("label") if isinstance(row, dict) else None, "row 0")


READERS = {
    "JSON": Reader(make_json, lambda f: read_json(f / "x.json")),
    "run, tables": Reader(make_run_of_two, read_tables),
    "run, page": Reader(make_run_of_two, read_page, slow=True, weight=0.2),
    "run, configuration": Reader(make_run_of_two, read_sweep),
    "W&B runs": Reader(make_wandb, read_wandb),
    "results of jobs": Reader(make_results, read_results),
    "denoiser": Reader(make_denoiser, read_denoiser, weight=0.5),
    "diffusers teacher": Reader(make_diffusers, read_teacher, weight=0.5),
    "diffusers pipeline": Reader(make_diffusers, read_pipeline, weight=0.5),
    "Stable Diffusion folder": Reader(make_text, read_text, slow=True, weight=0.2),
    "flax checkpoint": Reader(make_flax, read_flax),
    "checkpoint": Reader(make_checkpoint, read_checkpoint),
    "pictures": Reader(make_pictures, read_pictures),
    "folder of images": Reader(make_pictures, read_folder, weight=0.5),
    "zip of images": Reader(make_zip, read_zip),
    "cache of images": Reader(make_cache, read_cache),
    "npz": Reader(make_npz, read_npz, weight=0.5),
    "lmdb": Reader(make_lmdb, read_lmdb, weight=0.5),
    "metadata.jsonl": Reader(make_prompts, read_prompts),
    "latents": Reader(make_latents, read_latents),
    "metrics' caches and samples": Reader(make_caches, read_caches),
    "rows of datasets": Reader(make_rows, read_rows),
}


# ---- one input


@contextlib.contextmanager
def deadline(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TimeoutError, which is an OSError and so has another class here, after so many seconds."""

    def end(number: int, frame: object) -> None:
        raise HangError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class HangError(BaseException):
    """Not for `except Exception` to catch."""


def attempt(reader: Reader, folder: Path) -> str:
    """ "read", or the class of the error that told what is wrong, in one line. Raises whatever else comes."""
    os.environ["PDISTILL_CACHE"] = str(folder / ".cache")
    silence = io.StringIO()
    with deadline(), contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
        try:
            reader.read(folder)
        except ALLOWED as error:
            line = complaints.one_line(error)
            assert line.isprintable() and line
            return "refused"
    return "read"


def one(reader: Reader, good: Path, random: Random, work: Path) -> str:
    """One input: a copy of the good files with one, or two, changed."""
    folder = work / "input"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    for _ in range(random.choice([1, 1, 1, 2])):
        mutate(random, random.choice(files_of(folder)))
    return attempt(reader, folder)


def memory_peak() -> int:
    """Bytes, the largest resident size since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> int:
    """Starts the peak anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_peak()


def main(name: str, inputs: int, seed: int) -> None:
    """Tries one reader, and prints what became of the inputs."""
    reader, outcomes, largest, slowest = READERS[name], Counter(), 0, 0.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        good = work / "good"
        good.mkdir()
        os.environ["PDISTILL_CACHE"] = str(work / ".cache")
        reader.make(good)
        shutil.copytree(good, work / "input")
        assert attempt(reader, work / "input") == "read", f"{name} is not read as it is"
        resource.setrlimit(resource.RLIMIT_AS, (_virtual() + 4 * GIB, -1))  # an end for what takes far too much
        for number in range(seed, seed + inputs):
            before, start = forget_peak(), time.monotonic()
            try:
                outcomes[one(reader, good, Random(number), work)] += 1
            except BaseException as error:  # with the number that makes it again
                print(f"input {number} of {name}: {type(error).__name__}: {error}", file=sys.stderr)
                outcomes["CRASHED"] += 1
                if outcomes["CRASHED"] <= 3:
                    import traceback

                    traceback.print_exc()
            largest = max(largest, memory_peak() - before)
            slowest = max(slowest, time.monotonic() - start)
    told = {"reader": name, "inputs": inputs} | dict(outcomes)
    print(json.dumps(told | {"MiB": round(largest / 2**20), "slowest": round(slowest, 1)}), flush=True)


def _virtual() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    for chosen in READERS if sys.argv[1] == "all" else [sys.argv[1]]:
        main(chosen, max(1, round(int(sys.argv[2]) * READERS[chosen].weight)), int(sys.argv[3]))
