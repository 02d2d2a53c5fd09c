"""evaluate: what is measured against which data, which rows are kept, and what is refused in one line."""

import json
import multiprocessing
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
import yaml

from pdistill import registry
from pdistill.commands.contenders import _known_datasets, run_of
from pdistill.commands.evaluate import Rows, evaluate
from pdistill.commands.sample import draw
from pdistill.commands.settings import Evaluate, Sample
from pdistill.dataset import ImageSet, digits
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.generation import Draw
from pdistill.interop.diffusers import Pipeline
from pdistill.metrics.classifier import train_classifier
from pdistill.metrics.settings import Metrics
from pdistill.network import with_guidance
from pdistill.parameterization import V
from pdistill.report import tables
from pdistill.schedule import CosineSchedule

QUICK = partial(train_classifier, max_updates=20)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch, cache) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def a_run(tiny):
    """a_run("outputs/own", target="pdistill.dataset.digits") -> a run's directory, its denoisers untrained."""

    def a_run(directory: Path, seed: int = 0, **dataset) -> Path:
        for stage, num_steps in (("teacher", None), ("steps-0002", 2), ("steps-0001", 1)):
            denoiser = tiny(seed=seed + (num_steps or 0))
            denoiser.num_steps = num_steps
            denoiser.save(directory / stage / "denoiser")
        (directory / "config.yaml").write_text(yaml.dump({"dataset": dataset}))
        return directory

    return a_run


def measured(denoiser: str | Path, num_samples: int = 40, **settings) -> list[dict]:
    """The rows of an evaluation, in this process."""
    settings = {"bootstrap": 0, "device": "cpu", "metrics": Metrics(QUICK, num_samples)} | settings
    return json.loads(evaluate(Evaluate(denoiser=str(denoiser), **settings)).read_text())


def test_a_run_and_its_baselines_are_measured_once(here, a_run):
    run = a_run(here / "outputs" / "own", _target_="pdistill.dataset.digits")
    rows = measured(run, bootstrap=3, baselines=["ddim", "heun"])
    made = [(r["provenance"]["label"], r["provenance"]["num_steps"]) for r in rows]
    expected = [("real images", None), ("distilled", 1), ("distilled", 2)]
    assert made == expected + [(f"teacher, {s}", n) for s in ("ddim", "heun") for n in (1, 2)]
    assert all(r["fid_classifier"] > r["fid_classifier_std"] > 0 and 0 <= r["recall"] <= 1 for r in rows)
    assert rows[1]["provenance"]["reference_size"] == 1797 and rows[0]["provenance"]["num_samples"] == 40
    file = here / "outputs" / "evaluations" / "own.json"
    assert file.with_suffix(".png").exists() and "teacher, heun" in file.with_suffix(".md").read_text()
    assert measured(run, bootstrap=3, num_steps=2, baselines="ddim") == rows
    elsewhere = run.rename(here / "outputs" / "moved")  # the same weights, wherever they lie
    assert measured(elsewhere, bootstrap=3, name="own") == rows
    assert "distilled" not in file.with_suffix(".md").read_text()  # none lie where they were measured


def test_a_retrained_denoiser_at_the_same_path_is_measured_anew(here, a_run):
    run = a_run(here / "outputs" / "own", _target_="pdistill.dataset.digits")
    before = measured(run)
    measured(run / "teacher" / "denoiser", num_steps=4, name="own")
    a_run(run, seed=10, _target_="pdistill.dataset.digits")
    after = measured(run / "steps-0001")
    assert after[-1]["fid_classifier"] != before[1]["fid_classifier"]
    rows = measured(run)
    assert [r["provenance"]["label"] for r in rows] == ["real images", "distilled", "distilled"]  # no stale one
    assert all(a["fid_classifier"] != b["fid_classifier"] for a, b in zip(rows[1:], before[1:], strict=True))


def test_rows_of_version_0_1_0_are_shown_with_a_mark_until_they_are_measured_anew(here, a_run):
    run = a_run(here / "outputs" / "own", _target_="pdistill.dataset.digits")
    rows = measured(run)
    old = json.loads(json.dumps(rows[1:]))
    for row in old:
        for key in ("denoiser_fingerprint", "device"):
            del row["provenance"][key]
        row["provenance"]["version"] = "0.1.0"
    for description in run.glob("*/denoiser/denoiser.json"):  # a 0.1.0 denoiser does not know its fingerprint
        content = json.loads(description.read_text())
        del content["fingerprint"]
        description.write_text(json.dumps(content))
    file = here / "outputs" / "evaluations" / "own.json"
    file.write_text(json.dumps([rows[0], *old]))
    shown = [row["provenance"]["label"] for row in measured(run / "steps-0001", name="own")]
    assert shown == ["real images", "denoiser, ddim", "distilled", "distilled"]
    assert "measured otherwise: precision not recorded" in file.with_suffix(".md").read_text()
    assert len(measured(run)) == 4 and "otherwise" not in file.with_suffix(".md").read_text()  # in the old ones' place


def reds(number: int) -> ImageSet:
    images = torch.full((number, 1, 8, 8), 200, dtype=torch.uint8)
    images[:, :, :4] = torch.arange(number, dtype=torch.uint8)[:, None, None, None]
    return ImageSet("reds", images, torch.arange(number) % 2)


def test_a_run_is_measured_against_its_own_dataset(here, a_run, monkeypatch, capsys):
    run = a_run(here / "outputs" / "own", _target_=f"{__name__}.reds", number=50)
    with pytest.raises(UserError, match=f"{__name__}.reds, which is neither built in nor registered"):
        measured(run)
    monkeypatch.setitem(registry._parts["dataset"], "reds", reds)
    for place in (run, run / "steps-0001" / "denoiser"):
        assert {r["provenance"]["reference"] for r in measured(place)} == {"reds"}
    assert measured(run, dataset=digits(), name="other")[0]["provenance"]["reference"] == "digits"
    assert "digits" not in capsys.readouterr().out
    (run / "run.json").write_text('{"version": "0.2.0", "data": "other"}')
    measured(run)
    assert "the images of reds have changed since" in capsys.readouterr().out
    former = _known_datasets()["pdistill.dataset.huggingface.load"]
    run = a_run(here / "outputs" / "old", _target_="pdistill.huggingface.load")  # as version 0.1.0 wrote it
    monkeypatch.setattr("pdistill.commands.contenders._known_datasets", lambda: {NEW_PLACE: lambda: reds(50)})
    assert former.__module__ == "pdistill.dataset.huggingface" and measured(run)


NEW_PLACE = "pdistill.dataset.huggingface.load"


def test_a_lone_denoiser_is_measured_against_digits_if_it_fits_and_says_so(here, tiny, capsys):
    tiny().save("lone")
    assert measured("lone", num_steps=1)[0]["provenance"]["reference"] == "digits"
    assert capsys.readouterr().out.count("names no dataset: measured against digits") == 1
    tiny(size=16).save("large")
    with pytest.raises(UserError, match=r"lies in no run .* shape \(1, 16, 16\): give the dataset .* dataset="):
        measured("large", num_steps=1)
    with pytest.raises(UserError, match=r"shape \(1, 16, 16\) and digits holds \(1, 8, 8\)"):
        measured("large", num_steps=1, dataset=digits())
    with pytest.raises(UserError, match=r"made for no step count of its own: give num_steps=\[...\]"):
        measured("lone")
    with pytest.raises(UserError, match="num_reference=2000 must be 2 to 1797"):
        measured("lone", num_steps=1, num_reference=2000)
    with pytest.raises(UserError, match="metrics=classifier needs labels"):
        measured("lone", num_steps=1, dataset=ImageSet("bare", digits().images))
    few = measured("lone", 3, num_steps=1, num_reference=3, name="few")
    assert [r["provenance"]["label"] for r in few] == ["denoiser, ddim"]  # too few images for two halves


def test_what_diverges_is_refused_in_one_line(here, tiny):
    denoiser = tiny()
    denoiser.save("lone")
    with pytest.raises(UserError, match="steps by diverging are not finite"), pytest.MonkeyPatch.context() as patch:
        diverging = lambda denoise, schedule, z, num_steps, options: z / 0  # noqa: E731
        patch.setitem(registry._parts["sampler"], "diverging", diverging)
        measured("lone", num_steps=2, samplers="diverging")


@pytest.fixture
def a_guided_run(tiny):
    """a_guided_run(directory, low, high) -> a run of digits, its denoisers untrained: a teacher, and a student."""

    def a_guided_run(directory: Path, low: float, high: float) -> Path:
        teacher = Denoiser(tiny(num_classes=11).network, V(), CosineSchedule(), null_label=10)
        teacher.save(directory / "teacher" / "denoiser")
        network = with_guidance(teacher.network) if low < high else teacher.network
        if low < high:
            torch.nn.init.normal_(network.class_embedding.guidance.linear_2.weight)
        options = {"num_steps": 2, "lineage": ["teacher", "guided", 2], "null_label": 10, "guidance": (low, high)}
        Denoiser(network, V(), CosineSchedule(), **options).save(directory / "steps-0002" / "denoiser")
        (directory / "config.yaml").write_text(yaml.dump({"dataset": {"_target_": "pdistill.dataset.digits"}}))
        return directory

    return a_guided_run


def test_students_are_measured_at_the_guidance_that_they_were_taught(here, a_guided_run):
    run = a_guided_run(here / "outputs" / "guided", 1.0, 5.0)
    rows = measured(run, guidance=[1, 3], baselines="ddim")
    labels = [f"{name}, guidance {g}" for name in ("distilled", "teacher, ddim") for g in (1, 3)]
    assert [r["provenance"]["label"] for r in rows] == ["real images", *labels]
    assert [r["provenance"]["guidance"] for r in rows[1:]] == [1.0, 3.0, 1.0, 3.0]
    assert [r["provenance"].get("network_evaluations") for r in rows] == [None, None, None, None, 4]
    assert rows[1]["fid_classifier"] != rows[2]["fid_classifier"]
    assert tables.curves(rows)[1]["teacher, ddim, guidance 3"].keys() == {4}
    headings, lines, _ = tables.cells(rows)
    place = headings.index("evaluations")
    assert [line[place - 1 : place + 1] for line in lines] == [["2", "2"]] * 3 + [["2", "4"], ["", ""]]
    assert measured(run, guidance=[1, 3], baselines="ddim") == rows
    (own,) = measured(run, name="own")[1:]
    assert own["provenance"]["label"] == "distilled" and own["provenance"]["guidance"] == 1.0
    assert own["fid_classifier"] == rows[1]["fid_classifier"]
    assert run_of(run / "guided" / "denoiser") == run


def test_baselines_are_measured_at_the_one_value_that_students_were_taught(here, a_guided_run):
    rows = measured(a_guided_run(here / "outputs" / "guided", 2.0, 2.0), baselines="ddim")
    assert [r["provenance"]["label"] for r in rows[1:]] == ["distilled", "teacher, ddim, guidance 2"]
    assert [r["provenance"]["guidance"] for r in rows[1:]] == [2.0, 2.0]


def test_the_classifier_says_how_often_it_sees_the_class_asked_for(here, tiny, a_guided_run, monkeypatch):
    run = a_guided_run(here / "outputs" / "guided", 1.0, 5.0)
    data = digits()

    def real_ones(denoiser, batch, draw, device):
        """Instead of samples: images of the classes in turn, but every tenth is of the one before."""
        asked = [(i - (i % 10 == 9)) % 10 for i in batch]
        yield torch.stack([data.images[data.labels == k][3] for k in asked]) / 127.5 - 1

    monkeypatch.setattr("pdistill.commands.evaluate.generate", real_ones)
    well = Metrics(partial(train_classifier, max_updates=200), 300)
    rows = measured(run, metrics=well)
    assert 0.75 < rows[1]["class_accuracy"] <= 0.9 and rows[1]["class_accuracy_std"] == pytest.approx(0.02, abs=0.01)
    assert rows[0]["class_accuracy"] > 0.9
    tiny().save("lone")
    assert not any("class_accuracy" in row for row in measured("lone", num_steps=1, metrics=well))
    tiny(num_classes=7).save("other")
    assert not any("class_accuracy" in row for row in measured("other", num_steps=1, metrics=well))


def test_guidance_that_cannot_be_is_refused_in_one_line(here, tiny, a_guided_run):
    run = a_guided_run(here / "outputs" / "guided", 1.0, 5.0)
    one = a_guided_run(here / "outputs" / "one", 2.0, 2.0)
    tiny().save("lone")
    tiny(num_classes=10).save("no_null")
    foreign(here / "foreign", size=(8, 8))
    for place, guidance, problem in (
        (run, [2, 6], r"guidance=6: .*steps-0002/denoiser was taught guidance from 1 to 5"),
        (one, 3, "guidance=3: .* was taught guidance 2 alone: give that, or leave it out"),
        ("lone", 1, "guidance=1: lone is not class-conditional: leave it out"),
        ("no_null", 2, "guidance=2: no_null does not know what no label means: .* label_dropout"),
        ("foreign", 2, "guidance=2: foreign is an unconditional pipeline"),
    ):
        with pytest.raises(UserError, match=problem) as told:
            measured(place, num_steps=2, guidance=guidance)
        assert "\n" not in str(told.value)
    assert not (here / "outputs" / "evaluations").exists()
    plan = Sample(str(run / "steps-0002" / "denoiser"), guidance=0.5, num_images=2, output="a.png", device="cpu")
    with pytest.raises(UserError, match=r"guidance=0\.5 must be from 1 to 5, which this denoiser was taught"):
        draw(plan, run / "steps-0002" / "denoiser")
    assert not Path("a.png").exists()


def foreign(directory: Path, size=8, **scheduler) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    network = diffusers.UNet2DModel(size, 1, 1, layers_per_block=1, **blocks)
    diffusers.DDIMPipeline(network, diffusers.DDIMScheduler(**scheduler)).save_pretrained(directory)


def test_a_pipeline_of_diffusers(here, capsys):
    foreign(here / "foreign", size=(8, 8))
    rows = measured("foreign", num_steps=2)
    assert "names no dataset: measured against digits" in capsys.readouterr().out
    made_with = rows[-1]["provenance"]
    assert made_with["label"] == "foreign, own scheduler" and made_with["clip"] is True
    assert measured("foreign", num_steps=2) == rows
    foreign(here / "foreign", size=(8, 8), clip_sample=False)  # the same weights, another scheduler
    again = measured("foreign", num_steps=2)
    assert len(again) == 2 and again[-1]["provenance"]["clip"] is False and again != rows
    for settings, problem in (({}, "give num_steps="), ({"num_steps": 2000}, "foreign cannot take num_steps=2000")):
        with pytest.raises(UserError, match=problem) as told:
            measured("foreign", **settings)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("damage", ["unet/config.json", "scheduler/scheduler_config.json", "weights", "nan"])
def test_a_damaged_pipeline_is_refused_in_one_line(here, damage):
    foreign(here / "foreign")
    weights = here / "foreign" / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "nan":
        network = diffusers.UNet2DModel.from_pretrained(here / "foreign" / "unet")
        network.conv_in.weight.data[0] = torch.nan
        network.save_pretrained(here / "foreign" / "unet")
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (here / "foreign" / damage).unlink()
    with pytest.raises(UserError, match="foreign") as told:
        measured("foreign", num_steps=2)
    assert "\n" not in str(told.value)


def test_whatever_a_foreign_pipeline_raises_names_its_folder(here, monkeypatch):
    foreign(here / "foreign")
    pipeline = Pipeline.load("foreign")
    monkeypatch.setattr(pipeline.pipeline.unet, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"the pipeline foreign fails at 2 steps \(ZeroDivisionError"):
        list(pipeline.generate(range(3), Draw(2)))


def add_rows(file: Path, number: int) -> None:
    rows = Rows(file)
    for k in range(20):
        rows.add({"fid": 1.0, "provenance": {"label": "x", "denoiser": None, "num_steps": k + 1, "seed": number}})


def test_several_processes_at_once_lose_no_rows(tmp_path):
    file = tmp_path / "rows.json"
    processes = [multiprocessing.get_context("fork").Process(target=add_rows, args=(file, n)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(Rows(file).read()) == 40
    file.write_text("[{")
    with pytest.raises(UserError, match=r"rows\.json is damaged"):
        Rows(file).read()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"seed": -1}, "seed=-1 must be a whole number"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"devices": 0}, "devices=0"),
        ({"bootstrap": -1}, "bootstrap=-1"),
        ({"num_reference": 1}, "num_reference=1"),
        ({"num_steps": 0}, "num_steps=0 must be whole numbers, at least 1"),
        ({"num_steps": []}, r"num_steps=\[\]"),
        ({"steps": [1, 2.5]}, r"steps=\[1, 2.5\]"),
        ({"steps": 1, "num_steps": 2}, "give one of them"),
        ({"samplers": ["nobody"]}, "samplers=.*must be among ddim"),
        ({"baselines": 3}, "baselines=3 must be among"),
        ({"guidance": "much"}, "guidance=much must be numbers, at least 0, e.g. guidance=2"),
        ({"guidance": [1, -1]}, r"guidance=\[1, -1\] must be numbers"),
        ({"guidance": []}, r"guidance=\[\] must be numbers"),
        ({"name": "a/b"}, "name=a/b"),
        ({"extrapolate": True, "metrics": Metrics(QUICK, 5)}, "metrics.num_samples=5 must be at least 20"),
    ],
)
def test_settings_are_checked(settings, problem):
    with pytest.raises(UserError, match=problem):
        Evaluate(denoiser="x", **settings)


def test_the_command_takes_steps_by_both_names_and_several_devices(run, workplace, a_run):
    """Hydra would take steps=[1,2] for choices of the group conf/steps."""
    a_run(workplace / "outputs" / "untrained", _target_="pdistill.dataset.digits")
    command = ("evaluate.py", "denoiser=outputs/untrained", "metrics.num_samples=90", "batch_size=35", "bootstrap=3")
    command += ("metrics.extractor.max_updates=20",)
    files = {}
    for name, overrides in {"one": ["steps=[1,2]"], "two": ["num_steps=[1,2]", "devices=2"]}.items():
        status, out, err = run(*command, f"name={name}", "baselines=[ddim]", *overrides)
        assert status == 0 and "real images" in out, err
        files[name] = json.loads((workplace / "outputs" / "evaluations" / f"{name}.json").read_text())
    assert len(files["one"]) == 5
    for a, b in zip(files["one"], files["two"], strict=True):
        del a["seconds"], b["seconds"]
        assert a.pop("provenance") == b.pop("provenance") and a == pytest.approx(b, rel=1e-4)
