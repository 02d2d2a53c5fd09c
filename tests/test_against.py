"""The benchmarks against others and of growth, with numbers too small to mean anything."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from pdistill.errors import UserError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = """
import argparse, pathlib, torch
from diffusers import UNet2DModel
parser = argparse.ArgumentParser()
for word in ("train_data_dir", "model_config_name_or_path", "output_dir", "cache_dir", "mixed_precision"):
    parser.add_argument(f"--{word}")
for word in ("resolution", "train_batch_size", "num_epochs"):
    parser.add_argument(f"--{word}", type=int)
parser.add_argument("--use_ema", action="store_true")
args = parser.parse_args()
network = UNet2DModel.from_config(UNet2DModel.load_config(args.model_config_name_or_path))
optimizer = torch.optim.AdamW(network.parameters())
for _ in range(len(list(pathlib.Path(args.train_data_dir).iterdir())) // args.train_batch_size):
    images = torch.randn(args.train_batch_size, 3, args.resolution, args.resolution)
    network(images, torch.zeros(len(images))).sample.mean().backward()
    optimizer.step()
"""


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench("against", "--only", "plain") -> the module, its command line given, in a directory of its own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))

    def bench(name: str, *words: object):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return importlib.import_module(name)

    yield bench
    GlobalHydra.instance().clear()  # which a command that is left in the middle does not do


def test_ours_and_the_others_train_one_network(bench, monkeypatch, tmp_path, capsys):
    """Of one round; denoising-diffusion-pytorch, which is not installed here, is left out, and a line says so."""
    (tmp_path / "script.py").write_text(SCRIPT)
    against = bench("against", "--script", tmp_path / "script.py", "--network", "digits", "--json", "seconds.json")
    tiny = against.Case("digits", 8, 3, batch=4, steps=2, rounds=1, evaluations=2, samplings=2, limit=1.0)
    monkeypatch.setattr(against, "CASES", {"digits": tiny})
    monkeypatch.setattr(against, "PACKAGE", "a_package_that_nobody_has")
    monkeypatch.setattr(against, "measured", against.work_as)  # in this process
    against.main()
    shown = capsys.readouterr().out
    assert "left out: package: pip install denoising-diffusion-pytorch" in shown
    (one,) = json.loads(Path("seconds.json").read_text())["rounds"]
    assert {name: len(seconds) for name, seconds in one["seconds"].items()} == {
        "ours": 3 - 1, "plain": 2, "script": 2, "sample": 2, "sampler": 2
    }  # fmt: skip
    assert all(line in shown for name, line in against.NAMES.items() if name != "package")


def test_a_comparison_that_cannot_be_made_is_refused(bench):
    against = bench("against", "--only", "script")
    with pytest.raises(SystemExit, match="error: script cannot be measured: give --script PATH"):
        against.main()


def test_ratios_are_of_rounds(bench):
    """A round on a busy machine is slow for both, and does not move the ratio."""
    against = bench("against")
    rounds = [
        {"network": "digits", "seconds": {"ours": [0.01] * 3, "plain": [0.02] * 3}},
        {"network": "digits", "seconds": {"ours": [0.1] * 3, "plain": [0.2] * 3}},
    ]
    (line,) = against.table(rounds)[2:]
    assert "| 0.500 | 0.500 to 0.500 | 2 |" in line


def test_networks_of_other_sizes_are_refused(bench, monkeypatch):
    against = bench("against")
    monkeypatch.setattr(against, "prepare", lambda case, work: None)
    sizes = {"ours": 1, "plain": 2}
    results = {name: {"ends": [0.0, 1.0], "parameters": sizes[name]} for name in sizes}
    monkeypatch.setattr(against, "measured", lambda name, *_: results[name])
    with pytest.raises(UserError, match="differ in their numbers of parameters"):
        against.one_round(["plain"], against.CASES["digits"], None, 0)


def test_growth_measures_updates_and_images(bench, monkeypatch, tmp_path):
    growth = bench("growth")
    for key, value in {"WINDOW": 4, "LEFT_OUT": 1, "IMAGES": 20, "IMAGE_UPDATES": 5}.items():
        monkeypatch.setattr(growth, key, value)
    row = growth.updates(tmp_path, False, 8)
    assert len(row["ms"]) == 2 and len(row["MB"]) == 3 and min(row["ms"]) > 0 and min(row["MB"]) > 100
    assert "teacher" in growth.updates_table([row])[-1]
    rows = [growth.images(tmp_path, count, mapped) for mapped in (False, True) for count in (20, 40)]
    assert all(row["ms"] > 0 and row["first"] > 0 for row in rows)
    assert len(growth.images_table(rows)) == 2 + 4 + 2


def test_growth_reads_what_imports_took(bench):
    growth = bench("growth")
    printed = """import time: self [us] | cumulative | imported package
import time:       100 |        300 |   torch.nn
import time:   2000000 |    2500000 | torch
a line of the run
import time:       200 |        200 |     lightning.pytorch"""
    assert growth.imported(printed) == pytest.approx({"torch": 2.0001, "lightning": 0.0002})
    assert growth.slope([0.0, 1.0, 2.0], [5.0, 7.0, 9.0]) == pytest.approx(2)


@pytest.mark.slow
def test_growth_of_stages_and_the_start(bench, monkeypatch, tmp_path):
    growth = bench("growth")
    for key, value in {"STAGE_UPDATES": 3, "START_RUNS": 1}.items():
        monkeypatch.setattr(growth, key, value)
    (tmp_path / "stages").mkdir()
    row = growth.stages(tmp_path / "stages", 2)
    assert len(row["ms"]) == len(row["MB"]) == 2 and min(row["MB"]) > 100
    assert row["seconds"] > row["seconds_training"] > 0
    row = growth.start(tmp_path)
    assert 0 < row["packages"]["torch"] < row["imports"]
    assert "distill.py until its first update" in growth.start_table([row])[2]


@pytest.mark.slow
def test_the_package_trains_the_network_too(bench, monkeypatch, tmp_path):
    pytest.importorskip("denoising_diffusion_pytorch")
    against = bench("against")
    case = against.Case("digits", 8, 3, batch=16, steps=2, rounds=1, evaluations=2, samplings=2, limit=1.0)
    against.prepare(case, tmp_path)
    result = against.work_as("package", case, tmp_path, None)
    assert result["parameters"] == sum(p.numel() for p in against.speed.new_denoiser(case).parameters())
    assert len(result["ends"]) == 2 + against.WARM_UP + 1 and torch.tensor(result["ends"]).diff().min() > 0
