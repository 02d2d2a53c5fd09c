"""evaluate.py, and its metrics against others' and against what must hold."""

import json

import pytest
import torch

from pdistill.batches import to_float
from pdistill.dataset import digits
from pdistill.errors import UserError
from pdistill.evaluation import measures
from pdistill.extractors import train_classifier
from pdistill.metrics import fid_metric, measure_fid


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield train_classifier(digits(), epochs=6)


def test_figures_carry_their_provenance_and_are_measured_once(smoke, run, workplace):
    command = (
        "evaluate.py",
        f"denoiser={smoke / 'steps-0002' / 'denoiser'}",
        "metrics.num_samples=100",
        "name=figures",
    )
    status, out, err = run(*command, "steps=[1,2]", "samplers=[ddim,unipc]")
    assert status == 0 and "real halves" in out, err
    file = workplace / "outputs" / "evaluations" / "figures.json"
    rows = json.loads(file.read_text())
    made = [(r["provenance"]["sampler"], r["provenance"]["num_steps"]) for r in rows[1:]]
    assert made == [("ddim", 1), ("ddim", 2), ("unipc", 1), ("unipc", 2)]
    assert all(r["fid_classifier"] > r["fid_classifier_std"] > 0 and 0 <= r["recall"] <= 1 for r in rows)
    assert rows[1]["provenance"]["reference_size"] == 1797 and rows[0]["provenance"]["num_samples"] == 100
    status, _, err = run(*command, "steps=2")
    assert status == 0 and json.loads(file.read_text()) == rows, err

    status, _, err = run("evaluate.py", f"denoiser={smoke / 'teacher' / 'denoiser'}")
    assert status == 2 and "give steps=[...]" in err and err.count("\n") == 1
    status, out, _ = run(*command[:2], "metrics.num_samples=60", "name=few", "bootstrap=0")
    assert status == 0 and "60 samples for 64 features" in out


def test_metrics(extractor):
    data = digits()
    real = extractor(data.images)
    noisy = (to_float(data.images) + 0.3 * torch.randn(data.images.shape, generator=torch.Generator().manual_seed(0)))[
        :900
    ]
    row = measures(extractor(((noisy.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)), real, extractor, 5)
    assert row["fid_classifier"] == pytest.approx(measure_fid(fid_metric(extractor, data), iter([noisy])), rel=1e-3)
    same = measures(real, real, extractor, 0)
    assert same["fid_classifier"] == pytest.approx(0, abs=1e-3) and same["precision"] == same["recall"] == 1
    assert abs(same["kid_classifier"]) < row["kid_classifier"] and same["is_classifier"] > 8
    zeros_alone = measures(real[data.labels == 0], real, extractor, 0)
    assert zeros_alone["recall"] < 0.3 and zeros_alone["is_classifier"] == pytest.approx(1, abs=0.1)
    with pytest.raises(UserError, match="not finite or all alike"):
        measures(real[:1].expand(10, -1), real, extractor, 0)
