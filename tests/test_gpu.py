"""`make gpu`, rehearsed on the CPU with a toy network: items, limits, what is kept, and, slowly, all of it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_benchmarks import BENCHMARKS, benchmark

TOY = {"speed/4/float32", "speed/4/tf32", "sampling/float32", "parity/float32", "parity/bf16"}


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """benchmarks/gpu.py with fewer items."""
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu.Call, "items", fewer(gpu.Call.items))
    monkeypatch.setattr(gpu.gpu_speed, "SAMPLED_STEPS", (2,))
    precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    handler = signal.getsignal(signal.SIGTERM)
    yield gpu
    signal.signal(signal.SIGTERM, handler)
    torch.set_float32_matmul_precision(precision[0])
    torch.backends.cudnn.allow_tf32 = precision[1]


def fewer(items):
    return lambda call: [item for item in items(call) if item.name in TOY]


@pytest.fixture
def call(gpu, monkeypatch, capsys):
    """call("--limit", "9") -> what a call of the command prints; its time begins now."""

    def call(*words: str) -> str:
        monkeypatch.setattr(gpu, "BEGUN", time.monotonic())
        gpu.main(["--rehearse", "--output", "results", *words])
        return capsys.readouterr().out

    return call


def kept() -> dict:
    return json.loads(Path("results/results.json").read_text())["items"]


def test_calls_do_what_fits_and_go_on(gpu, call, monkeypatch):
    assert "0 of 5 items are done; the same command goes on" in call("--limit", "1")
    assert not Path("results").exists()
    assert "2 of 2 items are done:" in call("--only", "parity")
    shown = call()
    assert "5 of 5 items are done:" in shown and shown.count(" ...\n") == 3
    found = kept()
    assert set(found) == TOY and all(item["seconds"] > 0 and item["torch"] for item in found.values())
    speed = found["speed/4/float32"]["result"]
    for side in ("teacher", "bare", "distillation"):
        assert speed[side]["images_per_second"] == pytest.approx(4 / speed[side]["seconds"])
        assert len(speed[side]["all_seconds"]) == 2 and speed[side]["utilisation"] > 0
    exact, bf16 = (found[f"parity/{name}"]["result"]["losses"] for name in ("float32", "bf16"))
    assert len(exact) == len(bf16) == 5 and exact != bf16
    assert gpu.gpu_results.difference(bf16, exact)[0] < 0.1
    table = Path("results/results.md").read_text()
    assert "| 4 | float32 |" in table and "| float32 | 2 |" in table and "a rehearsal" in table
    monkeypatch.setattr(gpu.Call, "do", None)  # nothing is done again, nor where results were brought along
    assert table in call()
    assert "5 of 5 items are done:" in call("--output", "elsewhere", "--earlier", "results")


def test_an_item_that_fails_or_takes_too_long(gpu, call, monkeypatch):
    work = gpu.gpu_speed.Bench.losses
    monkeypatch.setattr(gpu.gpu_speed.Bench, "steps", lambda *_: time.sleep(60))
    monkeypatch.setattr(gpu.gpu_speed.Bench, "losses", lambda *_: 1 / 0)
    longest = gpu.LONGEST
    monkeypatch.setattr(gpu, "LONGEST", dict.fromkeys(longest, 0.2))
    told = call("--only", "speed/4/float32", "parity/float32")
    assert "2 of 2 items are done, 2 of them failed" in told and "--retry" in told
    table = Path("results/results.md").read_text()
    assert "- speed/4/float32: OverTime: took longer than" in table
    assert "- parity/float32: ZeroDivisionError: division by zero" in table
    monkeypatch.setattr(gpu.gpu_speed.Bench, "losses", work)
    monkeypatch.setattr(gpu, "LONGEST", longest)
    assert "1 of 1 items are done:" in call("--only", "parity/float32", "--retry")


def test_bad_input(gpu, call, monkeypatch):
    with pytest.raises(SystemExit, match="error: --data nowhere does not exist"):
        call("--data", "nowhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: there is no GPU here: --rehearse"):
        gpu.main(["--output", "results"])
    Path("results").mkdir()
    Path("results/results.json").write_text('{"rehearsed": false, "items": {}}')
    with pytest.raises(SystemExit, match=r"results.json is of another kind"):
        call()


def archive(path: Path) -> Path:
    """A tiny dataset laid out as the real one."""
    random = torch.Generator().manual_seed(0)
    with tarfile.open(path, "w:xz") as made:
        for split, count in {"train": 40, "test": 2}.items():
            for k in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=random, dtype=torch.uint8).numpy()
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "jpeg")
                member = tarfile.TarInfo(f"{split}/{'cat' if k % 2 else 'dog'}/{k:04d}.jpg")
                member.size = len(content.getvalue())
                content.seek(0)
                made.addfile(member, content)
    return path


@pytest.mark.slow
def test_the_whole_rehearsal_in_several_calls(tmp_path):
    """Every item, the training stopped at the limit and gone on with, by the command itself."""
    data = archive(tmp_path / "images.tar.xz")
    words = ["--rehearse", "--data", str(data), "--output", "out", "--work", "work", "--samples", "80"]
    words += ["--plan", "4", "2", "1", "--train", "training.updates=300", "checkpoint_every_n_updates=50"]
    words += ["--evaluate", "metrics.extractor.max_updates=5", "bootstrap=0"]
    environment = os.environ | {"PDISTILL_CACHE": str(tmp_path / "cache")}

    def call(*more: str) -> str:
        command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words, *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("--limit", "600", "--only", "speed", "sampling", "parity", "quality/updates")
    calls = [call("--limit", "40") for _ in range(2)]
    while "goes on" in calls[-1] and len(calls) < 12:
        calls.append(call("--limit", "600"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["items"]
    assert not [name for name, item in found.items() if "error" in item]
    assert "quality/training: stopped at the limit" in "".join(calls)
    summary = found["quality/training"]["result"]["summary"]
    assert [row["num_steps"] for row in summary] == [4, 2, 1] and summary[0]["updates"] == 300
    labels = {
        (row["provenance"]["label"], row["provenance"]["num_steps"])
        for row in found["quality/fid-classifier"]["result"]["rows"]
    }
    assert {("distilled", 1), ("teacher, unipc", 2), ("teacher, dpmsolver++2m", 1), ("teacher, ddim", 4)} <= labels
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.md",
        "samples.png",
        "curve-classifier.png",
    }
    table = (tmp_path / "out" / "results.md").read_text()
    assert len(re.findall(r"^\| (4|8) \|", table, re.M)) == 12 and "| ddp |" in table and "| compile |" in table
    count = re.search(r"(\d+) of (\d+) items are done:", calls[-1])
    assert count and count[1] == count[2] == str(len(found))
