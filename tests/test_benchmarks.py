"""The benchmarks run, with numbers too small to mean anything."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pdistill.metrics.classifier import train_classifier

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_speed_prints_every_ratio_and_keeps_the_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick", "--json", str(tmp_path / "seconds.json")])
    speed = benchmark("speed")
    tiny = {"batch": 4, "steps": 2, "rounds": 1, "evaluations": 1, "samplings": 2, "limit": 1.1}
    monkeypatch.setattr(speed, "QUICK", speed.Case("digits", 8, 1, **tiny))
    monkeypatch.setattr(speed, "train_classifier", partial(train_classifier, max_updates=5))
    monkeypatch.setattr(speed, "FID_FEATURES", 16)
    speed.main()
    rows = json.loads((tmp_path / "seconds.json").read_text())["rows"]
    shown = capsys.readouterr().out
    assert len(rows) == 7 and all(row["ours"] and min(row["ours"]) > 0 for row in rows)
    assert all((row.get("ratio") or row["seconds"]) in shown for row in rows)


def test_settings_and_the_profile_of_both_steps(monkeypatch, capsys):
    """The floor is no more than the step, and distilling keeps one copy of the weights more, as it should."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    profile_steps = benchmark("profile_steps")
    tiny = {"batch": 4, "steps": 1, "rounds": 1, "evaluations": 1, "samplings": 1, "limit": 1.1}
    monkeypatch.setattr(profile_steps, "CASES", {"digits": profile_steps.Case("digits", 8, 1, **tiny)})
    monkeypatch.setattr(sys, "argv", ["profile_steps.py", "--top", "3"])
    profile_steps.main()
    shown = capsys.readouterr().out
    cells = dict(line.strip("| ").split(" | ", 1) for line in shown.splitlines() if line.startswith("| "))
    teacher, distillation = (float(cell) for cell in cells["GFLOP"].split(" | "))
    assert 1.6 < distillation / teacher < 1.7  # 5/3, but that the first layer's input has no gradient
    assert all(float(cell) > 1 for cell in cells["step / floor"].split(" | "))
    assert all(float(cell) > 0 for cell in cells["convolutions"].split(" | "))
    measured, allowed = (
        float(word.strip(",")) for word in shown.split("peak of teacher training ")[1].split()[::7][:2]
    )
    assert 1 < measured <= allowed
    speed = sys.modules["speed"]
    monkeypatch.setattr(speed, "QUICK", profile_steps.CASES["digits"])
    monkeypatch.setattr(sys, "argv", ["speed.py", "--settings", "channels_last", "--network", "digits"])
    speed.main()
    shown = capsys.readouterr().out
    assert "channels_last: teacher step / plain" in shown and "channels_last: distillation / teacher" in shown
    change = float(shown.split("relative change of the target")[1].split()[0])
    assert 0 <= change < 1e-5


def test_import_time_names_the_target(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["import_time.py", "--runs", "1"])
    import_time = benchmark("import_time")
    monkeypatch.setattr(import_time, "MODULES", ("pdistill",))
    import_time.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("import pdistill "))
    assert "the target of 0.3 s" in line


def test_memory_of_text_to_image(monkeypatch, capsys):
    """Adapters take less of everything that is trained; of SD 1.5 itself the parameters are known, 859.5 million."""
    memory = benchmark("memory")
    small = memory.SD1 | {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 32, 32, 32)}
    monkeypatch.setattr(memory, "MODELS", {"small": small})
    monkeypatch.setattr(sys, "argv", ["memory.py", "--rank", "2"])
    memory.main()
    table = capsys.readouterr().out.splitlines()
    whole, adapters = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:])
    assert (whole[:2], adapters[:2]) == (["small", "whole"], ["small", "LoRA, rank 2"])
    assert int(adapters[10]) > int(whole[10]) > 1000
    with memory.torch.device("meta"):
        network = memory.UNet2DConditionModel(**memory.SD1)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 859.5


@pytest.mark.slow
def test_scaling_measures_one_two_apart_and_two_together(tmp_path):
    """Of which there are processes of their own: four."""
    words = [
        "--network",
        "digits",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--updates",
        "2",
        "--json",
        str(tmp_path / "s.json"),
    ]
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    seconds = json.loads((tmp_path / "s.json").read_text())["seconds"]
    assert list(seconds) == ["alone", "side by side", "together"]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert "what the hardware can do" in ended.stdout


@pytest.mark.slow
def test_the_picture_of_a_report(smoke, tmp_path, monkeypatch, capsys):
    from PIL import Image

    screenshots = benchmark("screenshots")
    monkeypatch.setattr(screenshots, "DOCS", tmp_path)
    screenshots.main(["report", str(smoke)])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.webp'}\n"
    assert Image.open(tmp_path / "report.webp").size == (1280 + 16 + 390, 800)
    monkeypatch.setattr(screenshots, "BROWSERS", ("no-such-browser",))
    with pytest.raises(SystemExit, match=r"error: this needs a browser: install the package chromium$"):
        screenshots.main(["report", str(smoke)])
