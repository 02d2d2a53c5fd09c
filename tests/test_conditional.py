"""Class-conditional training and sampling."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pdistill.sampling import sample
from pdistill.steps import Stage
from pdistill.training.distillation import DistillationModule
from pdistill.training.module import Recipe
from pdistill.training.settings import Distillation, Training
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import snr_plus_one


@pytest.mark.slow  # test_guidance has a run of classes, too
def test_classes_from_training_to_pictures(run, workplace):
    command = ("distill.py", "experiment=smoke", "conditional=true", "steps.plan=[4,2]", "metrics=none", "name=classes")
    status, _, err = run(*command)
    assert status == 0, err
    stages = [workplace / "outputs" / "classes" / s / "denoiser" for s in ("teacher", "steps-0002")]
    embeddings = []
    for stage in stages:
        assert json.loads((stage / "unet" / "config.json").read_text())["num_class_embeds"] == 10
        weights = load_file(stage / "unet" / "diffusion_pytorch_model.safetensors")
        embeddings.append(weights["class_embedding.weight"])
    assert not torch.equal(*embeddings)

    def pictures(label: str) -> list[bytes]:
        output = workplace / f"label-{len(label)}.png"
        options = (f"label={label}", "num_images=4", "individual=true", f"output={output}")
        status, _, err = run("sample.py", f"denoiser={stages[1]}", *options)
        assert status == 0, err
        return [Image.open(p).tobytes() for p in sorted(output.with_suffix("").iterdir())]

    three, both = pictures("3"), pictures("[3,8]")
    assert [a == b for a, b in zip(three, both, strict=True)] == [True, False, True, False]
    status, _, err = run("sample.py", f"denoiser={stages[1]}", "label=10")
    assert status == 2 and "classes 0 to 9" in err and err.count("\n") == 1
    status, _, err = run("distill.py", f"teacher={stages[0]}")
    assert status == 2 and "num_class_embeds 10, configured None" in err


def test_labels_for_an_unconditional_denoiser_are_refused(smoke, run):
    status, _, err = run("sample.py", f"denoiser={smoke / 'steps-0001' / 'denoiser'}", "label=3")
    assert status == 2 and "is not class-conditional" in err


def test_guidance_extrapolates_from_the_unlabelled_prediction(tiny):
    denoiser = tiny("v", num_classes=4)
    denoiser.null_label = 3
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])

    def x(guidance: float, label: torch.Tensor = label) -> torch.Tensor:
        return sample(denoiser, noise, 1, label, guidance=guidance, clip=False)

    none = x(1.0, torch.full((2,), 3))
    assert torch.allclose(x(0.0), none) and not torch.allclose(x(1.0), none)
    assert torch.allclose(x(2.5), none + 2.5 * (x(1.0) - none), atol=1e-5)
    with pytest.raises(ValueError, match="trained with label_dropout"):
        sample(tiny("v", num_classes=3), noise, 1, label, guidance=2.0)
    with pytest.raises(ValueError, match="is class-conditional: give it labels"):
        sample(denoiser, noise, 1)


def test_the_share_of_hidden_labels(tiny):
    denoiser = tiny("v", num_classes=4)
    denoiser.null_label = 3
    module = TeacherModule(denoiser, Recipe(Training(), snr_plus_one, label_dropout=0.25))
    label = module.condition_of({"label": torch.zeros(4000, dtype=torch.long)})
    assert set(label.tolist()) == {0, 3} and 0.22 < (label == 3).float().mean() < 0.28


def test_the_teacher_stays_frozen_and_out_of_the_checkpoint(tiny):
    recipe = Recipe(Distillation(dropout=0.1), snr_plus_one)
    module = DistillationModule(tiny(), Stage(1, 4, 0, 2, updates=2), recipe).train()
    assert module.student.training and not module.teacher.training
    assert not any(p.requires_grad for p in module.teacher.parameters())
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"] and all(k.startswith("denoiser.") for k in checkpoint["state_dict"])
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    assert {m.p for m in module.student.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert {m.p for m in module.teacher.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
