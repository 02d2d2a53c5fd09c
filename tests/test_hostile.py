"""Hostile content: what is planted never runs, what claims too much takes nothing, and all of it is told in one line.

The readers and the changes to their files are in `hostile`. The long test prints the table of docs/security.md.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random

import hostile
import numpy as np
import pytest
import torch
from finished_runs import evaluated, make_run, write_evaluation
from hostile import READERS, Planted, attempt, files_of, one
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pdistill import reading
from pdistill.commands import run_directory
from pdistill.dataset import image_folder, imagenet64, zips
from pdistill.dataset.pixels import open_picture
from pdistill.errors import UserError
from pdistill.files import read_json
from pdistill.report import page, tables

FAST = [name for name, reader in READERS.items() if not reader.slow]
INPUTS = 2000  # of the long test for each reader, times its weight
MOST_MIB = 1024


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """good("JSON") -> the folder of a reader's good files, made once."""
    made: dict[str, Path] = {}

    def good(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("good")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PDISTILL_CACHE", str(made[name] / ".cache"))
                READERS[name].make(made[name])
        return made[name]

    return good


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", FAST)
def test_whatever_stands_in_a_file_is_read_or_told(name, good, tmp_path):
    @given(seed=st.integers(0, 2**32))
    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def tried(seed):
        assert one(READERS[name], good(name), Random(seed), tmp_path) in ("read", "refused")

    tried()


def planted(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Planted(marker)))


def planted_by_torch(file: Path, marker: Path) -> None:
    torch.save({"state_dict": Planted(marker)}, file)


def endless(file: Path, marker: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def pipe(file: Path, marker: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def directory(file: Path, marker: Path) -> None:
    file.unlink()
    file.mkdir()


def deep(file: Path, marker: Path) -> None:
    file.write_text("[" * 100_000)


INSTEAD = [planted, planted_by_torch, endless, pipe, directory, deep]


@pytest.mark.parametrize("name", FAST)
def test_other_things_in_the_place_of_a_file(name, good, tmp_path):
    """Each file once, the kinds in turns; all kinds of the first."""
    files, marker = files_of(good(name)), tmp_path / "ran"
    cases = [(0, kind) for kind in INSTEAD] + [(k, INSTEAD[k % len(INSTEAD)]) for k in range(1, len(files))]
    for k, kind in cases:
        folder = tmp_path / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good(name), folder)
        kind(folder / files[k].relative_to(good(name)), marker)
        assert attempt(READERS[name], folder) in ("read", "refused"), kind
        assert not marker.exists(), f"{kind.__name__} in {files[k].name} ran"


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_inputs(name, capsys):
    inputs = round(INPUTS * READERS[name].weight)
    command = [sys.executable, hostile.__file__, name, str(INPUTS), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n| {name} | {told['inputs']} | {told.get('refused', 0)} | {told['MiB']} | {told['slowest']} |")
    assert told["inputs"] == inputs and "CRASHED" not in told, done.stderr[-3000:]
    assert told["MiB"] <= MOST_MIB


# ---- JSON and YAML


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested more than 100 deep"),
        ("[" * 500 + "]" * 500, "nested more than 100 deep"),
        ('{"a": 1, "b": {"x": 1, "x": 2}}', "says the key 'x' twice"),
        (f"[{'9' * 4000}]", "a whole number of 4000 digits"),
        ('"' + "x" * reading.MOST_TEXT + '"', "at most 16,777,216 are read"),
        ("", "is damaged"),
    ],
)
def test_json_within_limits(text, words, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_json(tmp_path / "x.json")


def test_a_runs_configuration_is_data(tmp_path, monkeypatch):
    """Interpolations, import paths and tags of a run's config.yaml: a text, a text, and refused."""
    monkeypatch.setenv("SECRET", "swordfish")
    run = make_run("run", {"teacher": 5.0}, root=tmp_path)
    (run / "config.yaml").write_text(
        'dataset: {_target_: os.system, command: "${oc.env:SECRET}"}\nseed: ${oc.env:SECRET}'
    )
    config = run_directory.config_of(run)
    assert config["seed"] == config["dataset"]["command"] == "${oc.env:SECRET}"
    from pdistill.commands.contenders import dataset_of_run

    with pytest.raises(UserError, match=r"names the dataset os.system, which is neither built in nor registered"):
        dataset_of_run(run)
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join(['*' + chr(97 + k)] * 10)}]\n" for k in range(9))
    for text in (laughs, f"x: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]", "a: 1\na: 2", "[" * 10_000, "- 1"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config.yaml is damaged"):
            run_directory.config_of(run)
    assert not (tmp_path / "ran").exists()


def test_a_row_leads_nowhere_else(tmp_path):
    """A stage's name is a directory; of a row of an evaluation, which may name any, no disk is searched."""
    run = make_run("run", {"teacher": 5.0}, root=tmp_path)
    row = json.loads((run / "teacher" / "metrics.json").read_text())
    for wrong in ({"stage": "../../elsewhere"}, {"num_steps": 0}, {"num_steps": True}, {"provenance": [1]}):
        (run / "teacher" / "metrics.json").write_text(json.dumps(row | wrong))
        with pytest.raises(UserError, match=r"no row of stage teacher with its num_steps"):
            page.write([run], tmp_path / "report.html")
    from pdistill.metrics.provenance import is_stale

    with hostile.deadline(2):
        assert not is_stale(evaluated(run, "x", 4, 1.0, denoiser="/"))


# ---- what is shown

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'|[a](javascript:b)\x1b[2J\x07$\\frac{$\n# x"


def test_every_text_is_shown_as_text(tmp_path, capsys):
    run = make_run(
        "run", {"teacher": 5.0, "steps-0004": 6.0}, {"logger": SCRIPT, "x": "</pre>" + SCRIPT}, root=tmp_path
    )
    (run / "run.json").write_text(json.dumps({"version": SCRIPT, "choices": {"a": SCRIPT}, SCRIPT: SCRIPT}))
    strange = {SCRIPT: 1.0, f"fid_{SCRIPT}": 2.0, "provenance": {"extractor": SCRIPT, SCRIPT: SCRIPT}}
    for stage in ("teacher", "steps-0004"):
        row = json.loads((run / stage / "metrics.json").read_text())
        (run / stage / "metrics.json").write_text(json.dumps(row | strange))
    rows = [evaluated(run, SCRIPT, 4, 5.0), evaluated(run, SCRIPT * 2, 8, 4.0, extractor=SCRIPT)]
    write_evaluation(run, [row | {f"fid_{SCRIPT}": 3.0} for row in rows])
    (run / "csv" / "version_0").mkdir(parents=True)
    (run / "csv" / "version_0" / "metrics.csv").write_text('step,"<b>$x$</b>/loss"\n1,0.5\n2,0.4\n')
    evil = tmp_path / "<script>alert(1)"
    shutil.copytree(run, evil)
    page.write([run, evil], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<script") == 1 and "<img src=x" not in text and "onerror=alert(1)>" not in text
    assert "<b>" not in text and "</pre>" + "<script" not in text and "\x1b" not in text.replace(SCRIPT, "")
    assert "&lt;script&gt;alert(1)" in text

    from pdistill.commands import evaluate

    evaluate.show(tmp_path / "evaluations" / "run.json")
    assert "\x1b" not in (shown := capsys.readouterr().out) and "\\x1b[2J" in shown
    evaluate.Rows(tmp_path / "evaluations" / "run.json").write_table_and_curve()
    for table in ((tmp_path / "evaluations" / "run.md").read_text(), "\n".join(tables.markdown([SCRIPT], [[SCRIPT]]))):
        assert "<script" not in table and "](javascript" not in table and "\x1b" not in table and "\n# x" not in table


# ---- networks and weights

GIANTS = {
    "width": {"block_out_channels": [2**20, 2**20]},
    "classes": {"num_class_embeds": 10**12},
    "layers": {"layers_per_block": 10**9},
    "blocks": {"block_out_channels": [32] * 10**5},
    "images": {"sample_size": 10**6},
}


@pytest.mark.parametrize("giant", GIANTS.values(), ids=GIANTS)
@pytest.mark.parametrize("name", ["denoiser", "diffusers teacher", "diffusers pipeline"])
def test_a_claimed_giant_takes_no_memory(name, giant, good, tmp_path):
    shutil.copytree(good(name), tmp_path / "input")
    (file,) = (tmp_path / "input").glob("*/unet/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | giant))
    before = hostile.forget_peak()
    assert attempt(READERS[name], tmp_path / "input") == "refused"
    assert hostile.memory_peak() - before < 200 * 2**20


def test_json_names_no_code(good, tmp_path):
    shutil.copytree(good("diffusers pipeline"), tmp_path / "input")
    folder, marker = tmp_path / "input" / "model", tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    for place in (folder / "evil.py", folder / "unet" / "evil.py", folder / "unet.py"):
        place.write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    for changed in (
        {"_class_name": ["evil", "Evil"]},
        {"unet": ["evil", "Evil"]},
        {"unet": ["os", "system"]},
        {"vae": ["antigravity", "x"]},
        {"scheduler": [["os"], "x"]},
    ):
        (folder / "model_index.json").write_text(json.dumps(index | changed))
        assert attempt(READERS["diffusers pipeline"], tmp_path / "input") == "refused"
        assert "antigravity" not in sys.modules
    for name, key in (("network", "name"), ("parameterization", "name"), ("schedule", "name")):
        target = tmp_path / name
        shutil.copytree(good("denoiser"), target)
        file = target / "denoiser" / "denoiser.json"
        described = json.loads(file.read_text())
        file.write_text(json.dumps(described | {name: {key: "os.system", "command": f"touch {marker}"}}))
        assert attempt(READERS["denoiser"], target) == "refused"
    assert not marker.exists()


def test_a_compressed_checkpoint_is_not_unpacked(good, tmp_path):
    shutil.copytree(good("checkpoint"), tmp_path / "input")
    file = tmp_path / "input" / "last.ckpt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", bytes(200 * 2**20))
    before = hostile.forget_peak()
    assert attempt(READERS["checkpoint"], tmp_path / "input") == "refused"
    assert hostile.memory_peak() - before < 50 * 2**20


# ---- images and archives


def saved(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_a_zip_neither_escapes_nor_bursts(tmp_path, monkeypatch):
    monkeypatch.setattr(zips, "MOST_BYTES", 2**20)
    picture = saved(Image.new("RGB", (9, 9), "red"), "PNG")
    bomb = bytes(50 * 2**20)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../../escaped.png", "/absolute.png", "a/good.png", "C:\\x.png"):
            archive.writestr(name, picture)
        archive.writestr("bomb.png", bomb)
        archive.writestr(zipfile.ZipInfo("lzma.png"), bomb[: 2**20], zipfile.ZIP_LZMA)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    del bomb
    before = hostile.forget_peak()
    with pytest.raises(UserError, match=r"3 of 6 images cannot be used, and 2 may .*more than 1,048,576.*deflate"):
        image_folder(str(tmp_path / "x.zip"), 8, max_corrupt_fraction=0.4)
    assert len(image_folder(str(tmp_path / "x.zip"), 8, max_corrupt_fraction=0.5).images) == 3
    assert hostile.memory_peak() - before < 30 * 2**20
    assert not list(tmp_path.parent.rglob("escaped.png")) and not Path("/absolute.png").exists()


def test_an_npz_neither_runs_nor_bursts(tmp_path):
    data, labels = np.zeros((2, 12288), np.uint8), np.array([1, 2])
    marker = tmp_path / "ran"
    np.savez(tmp_path / "train.npz", data=data, labels=np.array([Planted(marker), Planted(marker)], object))
    with pytest.raises(UserError, match=r"no batch of Downsampled ImageNet"):
        imagenet64(str(tmp_path))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 12288)})
    bursts = io.BytesIO()
    np.save(bursts, np.zeros((2**11, 12288), np.uint8))
    for content in (header.getvalue() + bytes(100), bursts.getvalue()):
        with zipfile.ZipFile(tmp_path / "train.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.npy", content)
            out = io.BytesIO()
            np.save(out, labels)
            archive.writestr("labels.npy", out.getvalue())
        before = hostile.forget_peak()
        with pytest.raises(UserError, match=r"of 2 images cannot be used"):
            imagenet64(str(tmp_path))
        assert hostile.memory_peak() - before < 50 * 2**20
    assert not marker.exists()


def test_an_npy_whose_header_does_not_end(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3, np.uint8))
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content.replace(b"(3,)", b"(3,("))
    with pytest.raises(ValueError, match=r"x\.npy is no array of numbers"):
        reading.array_of(tmp_path / "x.npy", "uint8", (3,))


def test_pictures_within_limits(tmp_path):
    """The header of a PNG may claim 2^31 pixels a side; PostScript would be drawn by another program."""
    png = saved(Image.new("L", (9, 9)), "PNG")
    import zlib

    def claiming(width: int, height: int) -> bytes:
        chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
        return png[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png[33:]

    for width, height in ((2**31 - 1, 2**31 - 1), (10_000, 10_000), (2**26 + 1, 1)):
        with pytest.raises((ValueError, Image.DecompressionBombError), match=r"pixels|DOS"):
            open_picture(io.BytesIO(claiming(width, height)))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(script)
    with pytest.raises(UserError, match=r"x.png: is no image"):
        image_folder(str(tmp_path / "photos"), 8)
    open_picture(io.BytesIO(claiming(8192, 8192))).close()
