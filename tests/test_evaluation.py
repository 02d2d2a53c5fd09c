"""evaluate.py, and its metrics against others' and against what must hold."""

import json
import os

import diffusers
import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from pdistill import extractors
from pdistill.dataset import digits
from pdistill.dataset.batches import to_float, to_uint8
from pdistill.errors import UserError
from pdistill.metrics.distances import FrechetDistance, measures
from pdistill.metrics.extractors import inception, train_classifier
from pdistill.metrics.reference import fid_metric, frechet_distance, measure_fid, reference
from pdistill.report.tables import cells, comparable


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield train_classifier(digits(), epochs=6)


def test_a_run_and_its_baselines_are_measured_once(smoke, run, workplace):
    command = ("evaluate.py", f"denoiser={smoke}", "metrics.num_samples=100", "name=figures")
    status, out, err = run(*command, "steps=[1,2]", "baselines=[ddim,heun]")
    assert status == 0 and "real images" in out, err
    file = workplace / "outputs" / "evaluations" / "figures.json"
    rows = json.loads(file.read_text())
    made = [(r["provenance"]["label"], r["provenance"]["num_steps"]) for r in rows]
    expected = [("real images", None), *(("distilled", n) for n in (1, 2, 4))]
    assert made == expected + [(f"teacher, {s}", n) for s in ("ddim", "heun") for n in (1, 2)]
    assert all(r["fid_classifier"] > r["fid_classifier_std"] > 0 and 0 <= r["recall"] <= 1 for r in rows)
    assert rows[1]["provenance"]["reference_size"] == 1797 and rows[0]["provenance"]["num_samples"] == 100
    assert file.with_suffix(".png").exists() and "teacher, heun" in file.with_suffix(".md").read_text()
    assert "Measured by evaluate.py" not in (smoke / "report.html").read_text()  # this one is under another name
    status, _, err = run(*command, "steps=2", "baselines=ddim")
    assert status == 0 and json.loads(file.read_text()) == rows, err

    status, _, err = run("evaluate.py", f"denoiser={smoke / 'teacher' / 'denoiser'}")
    assert status == 2 and "give steps=[...]" in err and err.count("\n") == 1
    status, _, err = run(*command, "num_reference=2000")
    assert status == 2 and "num_reference=2000 must be 2 to 1797" in err and err.count("\n") == 1
    status, out, _ = run(*command[:2], "metrics.num_samples=60", "name=few", "bootstrap=0")
    assert status == 0 and "60 samples for 64 features" in out


def test_two_processes_measure_what_one_does(smoke, run, workplace):
    denoiser = f"denoiser={smoke / 'steps-0002' / 'denoiser'}"
    for name, devices in (("one", 1), ("two", 2)):  # three batches: an uneven split
        overrides = [f"name={name}", f"devices={devices}", "metrics.num_samples=90", "batch_size=35", "bootstrap=3"]
        status, _, err = run("evaluate.py", denoiser, *overrides)
        assert status == 0, err
    one, two = (
        json.loads((workplace / "outputs" / "evaluations" / f"{name}.json").read_text()) for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        del a["seconds"], b["seconds"]
        assert a == pytest.approx(b, rel=1e-4) if "provenance" not in a else a.pop("provenance") == b.pop("provenance")
        assert a == pytest.approx(b, rel=1e-4)


def test_a_pipeline_of_diffusers(run, workplace):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    network = diffusers.UNet2DModel(8, 1, 1, layers_per_block=1, **blocks)
    diffusers.DDIMPipeline(network, diffusers.DDIMScheduler()).save_pretrained(workplace / "foreign")
    command = ("evaluate.py", "denoiser=foreign", "metrics.num_samples=70", "bootstrap=0")
    status, out, err = run(*command, "steps=2")
    assert status == 0 and "foreign, own scheduler" in out, err
    status, _, err = run(*command)
    assert status == 2 and "give steps=[...]" in err
    (workplace / "foreign" / "unet" / "config.json").unlink()
    status, _, err = run(*command, "steps=2")
    assert status == 2 and "diffusers cannot load the pipeline foreign" in err and err.count("\n") == 1


def test_metrics(extractor):
    data = digits()
    real = extractor(data.images)
    distance = frechet_distance(reference(extractor, data))
    random = torch.Generator().manual_seed(0)
    noisy = (to_float(data.images) + 0.3 * torch.randn(data.images.shape, generator=random))[:900]
    fake = extractor(to_uint8(noisy))
    row = measures(fake, real, distance, extractor.logits, 20, extrapolate=True)
    statistics = (fid_features_to_statistics(features.double()) for features in (fake, real))
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert row["fid"] == pytest.approx(theirs, rel=1e-6)
    assert row["fid"] == pytest.approx(measure_fid(fid_metric(extractor, data), iter([noisy])), rel=1e-3)
    same = measures(real, real, distance, extractor.logits, 0)
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1
    assert abs(same["kid"]) < row["kid"] and same["is"] > 8
    zeros_alone = measures(real[data.labels == 0], real, distance, extractor.logits, 0)
    assert zeros_alone["recall"] < 0.3 and zeros_alone["is"] == pytest.approx(1, abs=0.1)
    with pytest.raises(UserError, match="all alike"):
        measures(real[:1].expand(10, -1), real, distance, extractor.logits, 0)
    with pytest.raises(UserError, match="not finite"):
        measures(real[:10] / 0, real, distance, extractor.logits, 0)


def test_intervals_and_extrapolation_of_a_known_distance():
    """Gaussians of unit covariance, means 1 apart: the distance is 1, and finite samples say more."""
    random = torch.Generator().manual_seed(0)
    distance = FrechetDistance(torch.zeros(16).double(), torch.eye(16).double())

    def draw(n: int) -> torch.Tensor:
        samples = torch.randn(n, 16, generator=random)
        samples[:, 0] += 1
        return samples

    at_infinity, error = distance.extrapolated(draw(3000))
    assert distance(draw(300)) > 1.1 > at_infinity > 0.9 and abs(at_infinity - 1) < 5 * error < 0.5
    spread = np.std([distance(draw(1000)) for _ in range(60)])
    assert distance.bootstrap_std(draw(1000), 60) == pytest.approx(spread, rel=0.4)


def test_figures_of_different_provenance_carry_a_mark():
    base = {"label": "a", "extractor": "inception", "num_steps": 1, "num_samples": 100, "clip": True}
    rows = [{"fid": 2.0, "provenance": base}, {"fid": 1.0, "provenance": base | {"num_samples": 50, "label": "b"}}]
    assert comparable(*(row["provenance"] for row in rows)) == ["num_samples 50, there 100"]
    _, lines, notes = cells(rows)
    assert [line[0] for line in lines] == ["a", "b†"] and notes == ["† measured otherwise: num_samples 50, there 100"]


def test_inception_is_torch_fidelitys(monkeypatch, tmp_path):
    """With random weights, the published ones not being at hand; images enlarged as the literature does."""
    torch.save({}, tmp_path / "weights.pth")
    monkeypatch.setattr(extractors, "_check_digest", lambda file: None)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "weights.pth"))
        ours = inception(digits(), str(tmp_path / "weights.pth"))
    ours.network.load_state_dict(theirs.state_dict())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images)[0])
        assert ours(images[:, :1]).shape == (2, 2048) == (2, ours.num_features)
        assert ours.logits(ours(images)).shape == (2, 1008)


def test_damaged_inception_weights(tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(os.urandom(1000))
    with pytest.raises(UserError, match=r"weights.pth is damaged .* 6726825d"):
        inception(digits(), str(weights))
    with pytest.raises(UserError, match="weights are not to be had"):
        inception(digits(), str(tmp_path / "absent.pth"))
