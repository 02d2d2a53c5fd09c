"""`pdistill estimate`: its passes are those that a run counts, its FLOPs those of layers that one can count by hand."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir

from pdistill.commands import estimate
from pdistill.commands.settings import conf, settings_of
from pdistill.errors import UserError
from pdistill.training.footprint import activations, flops


def composed(*overrides: str):
    with initialize_config_dir(str(conf()), version_base="1.3"):
        return compose("estimate", ["name=x", *overrides])


def said(capsys, *overrides: str) -> dict[str, list[str]]:
    """The printed lines by their first word."""
    estimate.main(composed(*overrides))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    return {words[0]: words[1:] for words in lines}


def test_passes_are_those_of_a_run(smoke, capsys):
    found = said(capsys, "experiment=smoke")
    for row in json.loads((smoke / "summary.json").read_text()):
        passes = found[row["stage"]][1].replace(",", "")
        assert float(passes) == pytest.approx(row["network_passes"]) and int(found[row["stage"]][0]) == row["updates"]


@pytest.mark.parametrize(
    "overrides, stages",
    [
        ("method=parallel_decoding steps.plan=[8,2,1]", {"parallel-0008": 4}),
        ("method=tract steps.plan=[8,1]", {"steps-0001": 5}),
        ("method=halving steps.plan=[8,2]", {"steps-0002": 7}),
        (
            "conditional=true label_dropout=0.1 guidance=[1,2] steps.plan=[4,2,1]",
            {"guided": 5, "steps-0002": 5, "steps-0001": 5},
        ),
    ],
)
def test_passes_of_methods(overrides, stages):
    settings = settings_of(composed("metrics=none", "dataset=digits", *overrides.split()))
    images = estimate._images(settings, (1, 8, 8))
    rows = estimate.trainings(settings, True, estimate.new_denoiser(settings, images))
    assert {row.name: row.passes / row.updates for row in rows} == {"teacher": 3} | stages
    assert estimate.measurements(settings) == []


def test_of_a_layer():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert flops(lambda n: layer.to("meta")(torch.empty(n, 3, 8, 8))) == 2 * 3 * 9 * 5 * 64
    assert activations(layer, lambda n: layer(torch.empty(n, 3, 8, 8))) == (0, 4 * 3 * 64)


def test_hours(capsys):
    """One update more of the teacher, at 4 images a second on each of two devices."""
    rate = ["images_per_second=4", "trainer=ddp_cpu", "metrics=none", "steps.plan=[2,1]"]
    found = said(capsys, "training.updates=7200", "training.batch_size=64", *rate)
    assert found["teacher"][-1] == "16" and "memory" in found  # 7200 * 64 / 8 / 3600
    measured = said(capsys, "measure=true", "training.batch_size=2", "metrics=none", "steps.plan=[2,1]")
    assert float(measured["teacher"][-1]) > 0 and "(measured" in measured["hours:"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("images_per_second=3 measure=true", "images_per_second=3.0 and measure=true: give one of them"),
        ("image_shape=[3,32]", "must be channels, height and width"),
        ("dataset=none", "give image_shape="),
        ("trainer.devices=3 trainer.strategy=ddp", "distillation.batch_size=64 cannot be divided"),
        ("steps.plan=[8,3]", "3 does not divide 8"),
    ],
)
def test_what_is_refused(overrides, message):
    with pytest.raises(UserError) as refused:
        estimate.main(composed(*overrides.split()))
    assert message in str(refused.value) and "\n" not in str(refused.value)
