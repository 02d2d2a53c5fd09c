"""Students in diffusers' hands: opened from the disk by diffusers alone, they sample as `pdistill.sample` does."""

import json
import math
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pdistill import Denoiser, sample
from pdistill.errors import UserError
from pdistill.interop.diffusers import Pipeline
from pdistill.network import unet
from pdistill.parameterization import V
from pdistill.registry import find
from pdistill.schedule import BetaSchedule, CosineSchedule, EdmSchedule, FlowSchedule

BETAS = BetaSchedule(tuple((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist()))
ZERO_SNR = CosineSchedule(logsnr_min=-math.inf)
PLAIN = {  # (parameterization, schedule)
    "v": ("v", CosineSchedule()),
    "x": ("x", CosineSchedule()),
    "eps": ("eps", CosineSchedule()),
    "v, zero SNR": ("v", ZERO_SNR),
    "v, betas": ("v", BETAS),
    "eps, betas": ("eps", BETAS),
}
FLOW = {"flow": ("flow", FlowSchedule()), "flow of 1000": ("flow", FlowSchedule(train_timesteps=1000))}
OURS = {  # (parameterization, schedule, classes, guidance)
    "x_eps": ("x_eps", CosineSchedule(), None, 1.0),
    "v of classes": ("v", CosineSchedule(), 3, 1.0),
    "v of classes, guided": ("v", CosineSchedule(), 3, 2.0),
    "edm": ("edm", EdmSchedule(), None, 1.0),
    "edm, variance preserving": ("edm", ZERO_SNR, None, 1.0),
    "x, variance exploding": ("x", EdmSchedule(), None, 1.0),
    "flow, shifted": ("flow", FlowSchedule(shift=3.0), None, 1.0),
    "flow of classes": ("flow", FlowSchedule(), 3, 1.0),
    "v on straight paths": ("v", FlowSchedule(), None, 1.0),
    "x on straight paths": ("x", FlowSchedule(), None, 1.0),
}
SEED, BATCH = 5, 4


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """diffusers copies a folder's code to a cache, from which it imports it."""
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # another folder's, of the same name


@pytest.fixture
def student(tiny):
    """student("v", schedule, 4) -> a denoiser of random weights and so many steps, unlike any saved default."""

    def student(name: str, schedule, num_steps: int | None, classes: int | None = None) -> Denoiser:
        denoiser = tiny(name, num_classes=None if classes is None else classes + 1)
        network, null = denoiser.network, classes
        torch.nn.init.normal_(network.conv_out.weight, std=0.2)
        lineage = ["teacher", *([] if num_steps is None else [2 * num_steps, num_steps])]
        return Denoiser(network, denoiser.parameterization, schedule, num_steps, lineage, null).eval()

    return student


def drawn(folder, ours: bool = False, clipping: bool = False, **arguments) -> torch.Tensor:
    """Images in [-1, 1] by diffusers, from the noise of `noise()`."""
    if clipping:
        options = {"custom_pipeline": f"{folder}/pipeline.py", "trust_remote_code": True}
    else:
        options = {"trust_remote_code": True} if ours else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(BATCH, torch.Generator().manual_seed(SEED), output_type="pt", **arguments).images
    return images * 2 - 1


def noise() -> torch.Tensor:
    """As DDPMPipeline draws it."""
    return torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(SEED))


def expected(denoiser: Denoiser, num_steps: int, condition=None, **options) -> torch.Tensor:
    return sample(denoiser, noise(), num_steps, condition, **options).clamp(-1, 1)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.std() > 0.1 and bool((ours - theirs).abs().max() < 1e-3)


@pytest.fixture
def quiet(caplog):
    """Of diffusers' warnings about a folder, none."""
    diffusers.utils.logging.enable_propagation()
    yield
    diffusers.utils.logging.disable_propagation()
    warned = [r.getMessage() for r in caplog.records if r.name.startswith("diffusers") and r.levelname == "WARNING"]
    assert not [line for line in warned if "trust_remote_code" not in line and "accelerate" not in line]


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("kind", PLAIN)
def test_opened_as_it_is(student, tmp_path, quiet, kind, num_steps):
    denoiser = student(*PLAIN[kind], num_steps)
    denoiser.save(tmp_path / "student")
    assert same(expected(denoiser, num_steps), drawn(tmp_path / "student", num_inference_steps=num_steps))


@pytest.mark.parametrize("name", ["v", "x"])
def test_without_a_step_count_the_images_are_the_same(tmp_path, name):
    """Those of 3 steps, though diffusers takes its 1000."""
    torch.manual_seed(0)
    network = unet(8, 1, 1, 32, 32, [1], 1, [])
    torch.nn.init.normal_(network.conv_out.weight, std=0.2)
    denoiser = Denoiser(network, find("parameterization", name)(), ZERO_SNR, 3).eval()
    denoiser.save(tmp_path / "student")
    assert same(expected(denoiser, 3), drawn(tmp_path / "student"))


def test_a_teacher_in_steps_that_divide_its_grid(student, tmp_path):
    """The grid is 1000 where 250 is asked for, and whoever gives no step count takes all of it."""
    denoiser = student("v", CosineSchedule(), None)
    denoiser.save(tmp_path / "teacher", grid=250)
    for num_steps in (4, 40):
        assert same(expected(denoiser, num_steps), drawn(tmp_path / "teacher", num_inference_steps=num_steps))
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "teacher").scheduler
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    abar = torch.sigmoid(denoiser.schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), abar, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", FLOW)
def test_flow_by_its_euler_scheduler(student, tmp_path, quiet, kind, num_steps):
    """Unclipped as it is; clipped, and with the right default, by the file in the folder."""
    denoiser = student(*FLOW[kind], num_steps)
    folder = tmp_path / "student"
    denoiser.save(folder)
    assert "FlowMatchEuler" in (folder / "scheduler" / "scheduler_config.json").read_text()
    assert same(expected(denoiser, num_steps, clip=False), drawn(folder, num_inference_steps=num_steps))
    assert same(expected(denoiser, num_steps), drawn(folder, clipping=True))
    assert same(expected(denoiser, num_steps, clip=False), drawn(folder, clipping=True, clip=False))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("kind", OURS)
def test_by_the_pipeline_in_the_folder(student, tmp_path, quiet, kind, num_steps):
    name, schedule, classes, guidance = OURS[kind]
    denoiser = student(name, schedule, num_steps, classes)
    denoiser.save(tmp_path / "student")
    labels = None if classes is None else torch.tensor([2, 0, 1, 1])
    guided = {} if guidance == 1 else {"guidance": guidance}
    for clip in (True, False):
        ours = expected(denoiser, num_steps, labels, clip=clip, **guided)
        given = {"class_labels": labels, "num_inference_steps": num_steps, "clip": clip}
        assert same(ours, drawn(tmp_path / "student", ours=True, **given, **guided))
    in_turn = None if classes is None else torch.tensor([0, 1, 2, 0])
    assert same(expected(denoiser, num_steps, in_turn), drawn(tmp_path / "student", ours=True))
    half = max(1, num_steps // 2)
    assert same(expected(denoiser, half, in_turn), drawn(tmp_path / "student", ours=True, num_inference_steps=half))


def test_what_the_pipeline_cannot_take(student, tmp_path):
    student("v", CosineSchedule(), 4, 3).save(tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    for words, wrong in {
        "num_inference_steps=3 must divide 4": {"num_inference_steps": 3},
        "num_inference_steps=0 must divide 4": {"num_inference_steps": 0},
        "integers of 0 to 2": {"class_labels": [3]},
        "2 class_labels for batch_size=4": {"class_labels": [0, 1], "batch_size": 4},
    }.items():
        with pytest.raises(ValueError, match=words):
            pipeline(**wrong)
    assert len(pipeline(class_labels=[0, 1, 2]).images) == 3
    pipeline.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["num_steps"] == 4
    student("x_eps", CosineSchedule(), 4).save(tmp_path / "alone")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    for words, wrong in {"knows no classes": {"class_labels": [0]}, "label dropout": {"guidance": 2.0}}.items():
        with pytest.raises(ValueError, match=words):
            pipeline(**wrong)


def test_remote_code_is_not_run_unasked(student, tmp_path):
    """Nor by evaluate, of a folder that lost what says that it is ours."""
    student("x_eps", CosineSchedule(), 4).save(tmp_path / "student")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "student")
    (tmp_path / "student" / "denoiser.json").unlink()
    with pytest.raises(UserError, match="other code than diffusers' own, which never runs"):
        Pipeline.load(tmp_path / "student")


@pytest.mark.parametrize("kind", ["v", "flow", "x_eps"])
def test_the_continuous_network_comes_back_bit_for_bit(student, tmp_path, kind):
    schedule = FlowSchedule() if kind == "flow" else CosineSchedule()
    denoiser = student(kind, schedule, 4)
    denoiser.save(tmp_path / "student")
    again = Denoiser.load(tmp_path / "student")
    assert again.fingerprint == denoiser.fingerprint and again.architecture == denoiser.architecture
    z, t = noise(), torch.tensor([0.03, 0.3, 0.77, 1.0])
    assert torch.equal(again(z, t), denoiser(z, t))
    opened = UNet2DModel.from_pretrained(tmp_path / "student" / "unet")
    changed = [k for k, v in opened.state_dict().items() if not torch.equal(v, denoiser.network.state_dict().get(k, v))]
    assert changed == (["time_embedding.linear_1.weight"] if kind == "flow" else [])


def test_the_weights_say_what_they_are(student, tmp_path):
    student("v", CosineSchedule(), 4).save(tmp_path / "student")
    student("flow", FlowSchedule(), None).save(tmp_path / "teacher")
    found = []
    for name in ("student", "teacher"):
        with safe_open(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors", "pt") as weights:
            metadata = weights.metadata()
        assert metadata.pop("format") == "pt"
        found.append({key: json.loads(value) for key, value in metadata.items()})
    assert found[0] == {
        "pdistill_num_steps": 4,
        "pdistill_grid": [1.0, 0.75, 0.5, 0.25],
        "pdistill_lineage": ["teacher", 8, 4],
    }
    assert found[1]["pdistill_num_steps"] is None and len(found[1]["pdistill_grid"]) == 1024


def test_the_layout_of_earlier_versions(student, tmp_path):
    """Every network with a learned embedding of its grid, and nothing that says what the other was."""
    denoiser = student("x_eps", CosineSchedule(), 4)
    denoiser.save(tmp_path / "old")
    unet = tmp_path / "old" / "unet"
    config = json.loads((unet / "config.json").read_text())
    del config["_continuous_time"]
    config |= {"time_embedding_type": "learned", "num_train_timesteps": 4}
    (unet / "config.json").write_text(json.dumps(config))
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    rows = torch.zeros(4, config["block_out_channels"][0])
    save_file(weights | {"time_proj.weight": rows}, unet / "diffusion_pytorch_model.safetensors")
    again = Denoiser.load(tmp_path / "old")
    assert again.fingerprint == denoiser.fingerprint
    again.save(tmp_path / "new")
    assert same(expected(denoiser, 4), drawn(tmp_path / "new", ours=True))


def test_a_parameterization_of_somebody_else_is_kept_for_pdistill_alone(student, tmp_path):
    class Mine(V):
        name = "v"

    import pdistill

    pdistill.register("parameterization", "mine", Mine)
    denoiser = student("v", CosineSchedule(), 4)
    denoiser.parameterization = Mine()
    denoiser.save(tmp_path / "student")
    assert not (tmp_path / "student" / "model_index.json").exists()
    assert torch.equal(expected(Denoiser.load(tmp_path / "student"), 4), expected(denoiser, 4))


@pytest.mark.parametrize("kind", ["v", "flow", "x_eps"])
def test_a_folder_is_the_same_bytes_each_time(student, tmp_path, kind):
    """safetensors itself writes the keys of its metadata in a random order."""
    denoiser = student(kind, FlowSchedule() if kind == "flow" else CosineSchedule(), 2)
    contents = []
    for k in range(6):
        denoiser.save(tmp_path / str(k))
        files = sorted(p for p in (tmp_path / str(k)).rglob("*") if p.is_file())
        contents.append([(p.relative_to(tmp_path / str(k)), p.read_bytes()) for p in files])
    assert all(content == contents[0] for content in contents)
