"""Metrics against others' and against what must hold; extractors, references and provenance."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from forked import free_port
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pdistill.dataset import ImageSet, digits
from pdistill.dataset.batches import to_float, to_uint8
from pdistill.errors import UserError
from pdistill.metrics import classifier, distances, extractors, provenance
from pdistill.metrics import reference as references
from pdistill.metrics.classifier import train_classifier
from pdistill.metrics.distances import FrechetDistance, measures, moments
from pdistill.metrics.extractors import build, inception
from pdistill.metrics.fid import FID
from pdistill.metrics.reference import reference
from pdistill.metrics.settings import Metrics


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield train_classifier(digits(), epochs=6)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class MeanColour(nn.Module):
    """An extractor from outside: no fingerprint, no logits."""

    name = "mean_colour"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self.scale * images.float().flatten(2).mean(2)


def noisy_digits() -> torch.Tensor:
    data = digits()
    random = torch.Generator().manual_seed(0)
    return (to_float(data.images) + 0.3 * torch.randn(data.images.shape, generator=random))[:900]


def test_metrics(extractor):
    data = digits()
    real, fake = extractor(data.images), extractor(to_uint8(noisy_digits()))
    measured = reference(extractor, data)
    distance = FrechetDistance(measured.mean, measured.covariance)
    row = measures(fake, real, distance, extractor.logits, 20, extrapolate=True)
    statistics = (fid_features_to_statistics(features.double()) for features in (fake, real))
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert row["fid"] == pytest.approx(theirs, rel=1e-6)
    same = measures(real, real, distance, extractor.logits, 0)
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1
    assert abs(same["kid"]) < row["kid"] and same["is"] > 8
    zeros_alone = measures(real[data.labels == 0], real, distance, extractor.logits, 0)
    assert zeros_alone["recall"] < 0.3 and zeros_alone["is"] == pytest.approx(1, abs=0.1)
    with pytest.raises(UserError, match="all alike"):
        measures(real[:1].expand(10, -1), real, distance, extractor.logits, 0)
    with pytest.raises(UserError, match="not finite"):
        measures(real[:10] / 0, real, distance, extractor.logits, 0)


def test_the_one_fid_batch_by_batch_against_scipy(extractor):
    """Features far from the origin, where float32 sums, and E[x^2] - E[x]^2, would cancel."""
    data = digits()
    real, fake = (extractor(x).double() + 1e4 for x in (data.images, to_uint8(noisy_digits())))
    (m1, c1), (m2, c2) = ((f.numpy().mean(0), np.cov(f.numpy(), rowvar=False)) for f in (real, fake))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    distance = FrechetDistance(*moments(real))
    for features in fake.split(250):
        distance.update(features)
    assert float(distance.compute()) == pytest.approx(expected, rel=1e-6)
    assert distance.of(fake) == pytest.approx(float(distance.compute()), rel=1e-9)
    distance.reset()
    distance.update(real)
    assert float(distance.compute()) == pytest.approx(0, abs=1e-6)
    assert not distance.state_dict()  # nothing that would go into a checkpoint


def test_precision_and_recall_in_parts_are_torch_fidelitys(extractor, monkeypatch):
    real, fake = extractor(digits().images[:700]), extractor(to_uint8(noisy_digits()))[:500]
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    for part in (64, 10_000):
        monkeypatch.setattr(distances, "PART", part)
        ours = distances.precision_and_recall(fake, real)
        assert {key: ours[key] for key in ("precision", "recall")} == pytest.approx(
            {key: theirs[key] for key in ("precision", "recall")}, abs=1e-6
        )
        assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1


@pytest.mark.parametrize("n", [2, 3, 5, 9, 10])
def test_few_samples_leave_metrics_out_and_give_no_nan(extractor, n):
    real = extractor(digits().images[:100])
    row = measures(extractor(to_uint8(noisy_digits()[:n])), real, FrechetDistance(*moments(real)), extractor.logits, 5)
    assert all(np.isfinite(value) for value in row.values())
    assert ("is" in row) == (n >= 10) and ("precision" in row) == (n >= 4) and {"fid", "fid_std", "kid"} <= set(row)


def test_intervals_and_extrapolation_of_a_known_distance():
    """Gaussians of unit covariance, means 1 apart: the distance is 1, and finite samples say more."""
    random = torch.Generator().manual_seed(0)
    distance = FrechetDistance(torch.zeros(16).double(), torch.eye(16).double())

    def draw(n: int) -> torch.Tensor:
        samples = torch.randn(n, 16, generator=random)
        samples[:, 0] += 1
        return samples

    at_infinity, error = distance.extrapolated(draw(3000))
    assert distance.of(draw(300)) > 1.1 > at_infinity > 0.9 and abs(at_infinity - 1) < 5 * error < 0.5
    spread = np.std([distance.of(draw(1000)) for _ in range(60)])
    assert distance.bootstrap_std(draw(1000), 60) == pytest.approx(spread, rel=0.4)


def test_precision_and_recall_of_a_perfect_sampler_against_a_folder_sorted_by_class(monkeypatch):
    monkeypatch.setattr(distances, "PRC_IMAGES", 600)
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 8, generator=random) * 10
    real, fake = (centres.repeat_interleave(150, 0) + torch.randn(3000, 8, generator=random) for _ in range(2))
    row = distances.precision_and_recall(fake[torch.randperm(3000, generator=random)], real)
    assert row["precision"] > 0.8 and row["recall"] > 0.8


def test_the_reference_is_of_all_images_and_keeps_features_of_a_random_few(cache, monkeypatch):
    monkeypatch.setattr(references, "REFERENCE_FEATURES", 100)
    images = torch.arange(1000).mul(255).div(999).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    data, extractor = ImageSet("sorted", images), build(lambda data: MeanColour(), ImageSet("sorted", images))
    measured = reference(extractor, data)
    mean, covariance = moments(images.float()[:, :, 0, 0])
    torch.testing.assert_close(measured.mean, mean)
    torch.testing.assert_close(measured.covariance, covariance)
    assert len(measured.features) == 100 and measured.features[:50].mean() < 100 and measured.features.std() > 50
    calls = extractor.calls
    again = reference(extractor, data, features=False)
    assert extractor.calls == calls and again.features is None and torch.equal(again.covariance, measured.covariance)
    next(cache.glob("reference*.safetensors")).write_bytes(b"damaged")
    assert torch.equal(reference(extractor, data).features, measured.features)


def test_the_classifier_is_cached_and_goes_on_where_it_was_stopped(cache, monkeypatch):
    monkeypatch.setattr(classifier, "SAVED_EVERY", 10)
    data, undisturbed = digits(), extractors.fingerprint_of(train_classifier(digits(), max_updates=35))
    first = {p.name: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")}
    assert extractors.fingerprint_of(train_classifier(data, max_updates=35)) == undisturbed
    assert {p.name: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")} == first and len(first) == 1
    next(cache.glob("*.safetensors")).unlink()
    updates = []

    def stopped(purpose: str, update: int) -> torch.Generator:
        updates.append(update)
        if len(updates) == 26:
            raise KeyboardInterrupt
        return torch.Generator().manual_seed(update)

    monkeypatch.setattr(classifier, "generator", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(data, max_updates=35)
    assert updates[-1] == 25
    resumed = extractors.fingerprint_of(train_classifier(data, max_updates=35))
    assert updates[26] == 20 and updates[-1] == 34 and not list(cache.glob("*.partial"))
    next(cache.glob("*.safetensors")).unlink()
    assert extractors.fingerprint_of(train_classifier(data, max_updates=35)) == resumed
    many = ImageSet("many", torch.zeros(300_000, 1, 2, 2, dtype=torch.uint8), torch.zeros(300_000, dtype=torch.long))
    monkeypatch.setattr(classifier._Training, "run", lambda self, updates, device: pytest.fail(f"{updates} updates"))
    with pytest.raises(pytest.fail.Exception, match="3000 updates"):
        train_classifier(many)
    with pytest.raises(UserError, match=r"needs labels, and bare has none.*metrics=inception"):
        train_classifier(ImageSet("bare", data.images))


def test_an_extractor_from_outside(cache):
    data = ImageSet("colours", torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8))
    extractor = build(lambda data: MeanColour(), data)
    assert extractor.num_features == 3
    fingerprint = extractors.fingerprint_of(extractor)
    assert fingerprint == extractors.fingerprint_of(MeanColour())
    extractor.scale.fill_(2)
    assert extractors.fingerprint_of(extractor) != fingerprint  # buffers are weights, too
    real = extractor(data.images)
    row = measures(real[:20], real, FrechetDistance(*moments(real)), getattr(extractor, "logits", None), 0)
    assert "is" not in row and row["precision"] == 1
    assert FID(extractor, data, 10).name == "fid_mean_colour"
    nameless = MeanColour()
    nameless.name = None
    with pytest.raises(UserError, match="MeanColour has name=None: give it a `name`"):
        build(lambda data: nameless, data)
    pixels = nn.Identity()
    pixels.name = "pixels"
    with pytest.raises(UserError, match=r"pixels must map .* gives \(2, 3, 4, 4\)"):
        build(lambda data: pixels, data)


def test_provenance_says_what_was_in_force(extractor, tiny, cache):
    fid, denoiser = FID(extractor, digits(), 20), tiny()
    assert fid.measure(denoiser, 1) == fid.measure(denoiser, 1) > 0
    made_with = fid.provenance(denoiser, 1)
    expected = {"denoiser_fingerprint": denoiser.fingerprint, "precision": "float32", "device": "cpu", "clip": True}
    assert expected.items() <= made_with.items() and made_with["reference_fingerprint"] == digits().fingerprint
    before = torch.backends.cudnn.conv.fp32_precision
    for precision, expected in (("tf32", "float32 with tf32 convolutions"), ("ieee", "float32")):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert provenance.precision_in_force("cuda") == expected
    torch.backends.cudnn.conv.fp32_precision = before
    with torch.autocast("cpu", torch.bfloat16):
        assert provenance.precision_in_force("cpu") == "bfloat16"
    with torch.no_grad():
        denoiser.network.conv_in.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        fid.measure(denoiser, 1)


def test_metrics_of_different_provenance_are_no_comparison():
    base = {"label": "a", "extractor": "inception", "num_steps": 1, "num_samples": 100, "clip": True}
    assert provenance.comparable(base, base | {"num_samples": 50, "label": "b"}) == ["num_samples 50, there 100"]
    old = base | {"precision": "float32"}  # of version 0.1.0: what was assumed
    new = old | {"device": "cpu", "denoiser_fingerprint": "w"}
    assert provenance.comparable(old, old) == [] and provenance.comparable(new, new) == []
    assert provenance.comparable(new, old) == ["precision not recorded, there float32"]


def test_a_row_is_stale_once_other_weights_lie_where_its_own_were(tiny, tmp_path):
    directory = tmp_path / "denoiser"
    tiny().save(directory)
    row = {"provenance": {"denoiser": str(directory), "denoiser_fingerprint": tiny().fingerprint}}
    old = {"provenance": {"denoiser": str(directory)}}  # of version 0.1.0, which cannot have measured these
    real = {"provenance": {"denoiser": None}}
    assert provenance.current([row, old, real]) == [row, real]
    tiny(seed=1).save(directory)
    assert provenance.current([row, real]) == [real]
    description = json.loads((directory / "denoiser.json").read_text())
    del description["fingerprint"]
    (directory / "denoiser.json").write_text(json.dumps(description))  # as version 0.1.0 wrote it
    assert provenance.current([old]) == [old]


PROCESSES = """
import sys, torch
from pdistill.dataset import digits
from pdistill.errors import UserError
from pdistill.metrics import reference as references
from pdistill.metrics.classifier import train_classifier
from pdistill.metrics.extractors import build
from pdistill.metrics.fid import FID
from pdistill.network import unet
from pdistill import CosineSchedule, Denoiser, V

world = int(sys.argv[1])
if world > 1:
    torch.distributed.init_process_group("gloo")
data = digits()
extractor = build(lambda data: train_classifier(data, max_updates=20), data)
torch.manual_seed(0)
network = unet(8, 1, 1, 32, 64, [1, 1], 1, [4])
for p in network.parameters():
    torch.nn.init.normal_(p, std=0.05)
denoiser = Denoiser(network, V(), CosineSchedule())
fid = FID(extractor, data, 90, batch_size=35)  # three batches: an uneven split
value = fid.measure(denoiser, 1)
measured = references.reference(extractor, data)
if world == 1 or torch.distributed.get_rank() == 0:
    print(repr([value, float(measured.covariance.sum()), float(measured.features.double().sum())]))
fid.extractor = lambda images: extractor(images) / (len(images) != 20)  # what the last batch gives is not finite
fid.extractor.to = lambda device: None
try:
    fid.measure(denoiser, 1)
except UserError as error:
    print(error)
"""


def test_two_processes_measure_what_one_does_and_fail_together(tmp_path):
    """The reference is extracted by both, and so are the samples; an error in one is an error in both."""
    results = {}
    for world in (1, 2):
        environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= os.environ | {"PDISTILL_CACHE": str(tmp_path / f"cache{world}")}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        started = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESSES, str(world)],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        lines = [process.communicate(timeout=120)[0].strip().splitlines() for process in started]
        assert all("not finite" in of_rank[-1] for of_rank in lines), lines
        results[world] = json.loads(lines[0][0])
    assert results[2] == pytest.approx(results[1], rel=1e-9)


def test_inception_is_torch_fidelitys(monkeypatch, tmp_path):
    """With random weights, as the published ones are not available here; images enlarged as the literature does."""
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
    with pytest.raises(UserError, match="weights are not available"):
        inception(digits(), str(tmp_path / "absent.pth"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_samples": 1}, "metrics.num_samples=1"),
        ({"num_samples": 2.5}, "metrics.num_samples=2.5"),
        ({"every_n_updates": 0}, "metrics.every_n_updates=0"),
        ({"teacher_curve": {"steps": [1]}}, "metrics.teacher_curve="),
        ({"teacher_curve": {"steps": [0], "samplers": ["ddim"]}}, "metrics.teacher_curve="),
        ({"teacher_curve": {"steps": [1], "samplers": ["nobody"]}}, "metrics.teacher_curve="),
    ],
)
def test_settings_are_checked(settings, key):
    with pytest.raises(UserError, match=key):
        Metrics(extractor=train_classifier, **settings)
    Metrics(extractor=None, num_samples=0)
