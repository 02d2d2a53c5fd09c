"""Every mistake is one line on stderr and a non-zero exit, before anything is written."""

import pytest
from PIL import Image

BAD = [
    # what Hydra says of keys and groups, in our words
    ("distill.py weighting=foo", ["weighting/foo", "truncated_snr"]),
    ("distill.py sede=1", ["no key sede, did you mean seed?"]),
    ("distill.py +sede=1", ["no key sede"]),
    ("train.py training.update=1", ["no key training.update, did you mean training.updates?"]),
    ("train.py overwrite", ["overwrite: expected key=value"]),
    ("distill.py teacher=outputs/a=b", ["holds '='", "'teacher=\"outputs/a=b\"'"]),
    ("sample.py denoiser=a,b", ["a,b"]),
    # wrong types and values name their key
    ("train.py seed=1.5", ["seed=1.5 must be a whole number"]),
    ("train.py seed=-1", ["seed=-1 must be a whole number, at least 0"]),
    ("train.py seed=null", ["seed=null must have a value"]),
    ("train.py conditional=perhaps", ["conditional=perhaps must be true or false"]),
    ("train.py training.updates=many", ["training.updates=many", "whole number"]),
    ("train.py training.ema_decay=1.5", ["training.ema_decay=1.5", "or null"]),
    ("train.py training.learning_rate=-1", ["training.learning_rate=-1"]),
    ("train.py max_batch_per_device=0", ["max_batch_per_device=0", "at least 1"]),
    ("train.py samples_every_n_updates=0", ["samples_every_n_updates=0", "at least 1"]),
    ("distill.py steps.plan=8", ["steps.plan=8 must be a list"]),
    ("distill.py steps.plan=null", ["steps.plan=null must have a value"]),
    ("distill.py steps.plan=[]", ["steps.plan=[] must list at least two"]),
    ("distill.py steps.plan=[32,5]", ["5 does not divide 32"]),
    ("train.py steps.plan=[32]", ["at least two"]),
    ("train.py name=../escape", ["one directory name"]),
    ("train.py trainer.precision=bf16-true", ["trainer.precision=bf16-true", "bf16-mixed"]),
    ("train.py trainer.devices=two", ["trainer.devices=two"]),
    ("train.py metrics.teacher_curve={steps:[0],samplers:[ddim]}", ["teacher_curve", "e.g."]),
    ("train.py metrics.num_samples=1", ["metrics.num_samples=1"]),
    ("sample.py", ["denoiser=<directory> is missing"]),
    ("sample.py num_steps=0", ["num_steps=0"]),
    ("sample.py label=1.5", ["label=1.5"]),
    ("sample.py output=grid", ["output=grid must end in .png"]),
    ("evaluate.py", ["denoiser=<directory> is missing"]),
    ("evaluate.py devices=0", ["devices=0 must be a whole number, at least 1"]),
    ("evaluate.py seed=-1", ["seed=-1"]),
    # what does not fit together
    ("train.py schedule=edm schedule.sigma_max=.inf", ["sigma_max=inf", "no zero terminal SNR"]),
    ("distill.py parameterization=eps", ["eps cannot be distilled", "allow_unstable=true"]),
    ("train.py parameterization=eps schedule=cosine_zero_snr", ["eps cannot be trained", "allow_unstable=true"]),
    ("train.py training.batch_size=63 trainer=ddp_cpu", ["training.batch_size=63", "multiple of 2"]),
    ("train.py trainer=fsdp_cpu trainer.precision=16-mixed", ["precision=16-mixed", "trainer=fsdp", "bf16-mixed"]),
    ("train.py trainer.strategy=fsdp", ["trainer.strategy=fsdp", "use trainer=fsdp"]),
    ("train.py network.ch=20", ["multiple of 32"]),
    ("train.py metrics=none metrics.every_n_updates=10", ["every_n_updates=10", "metrics=none measures nothing"]),
    ("train.py label_dropout=0.1", ["add conditional=true"]),
    ("distill.py trainer.accelerator=abacus", ["abacus"]),
    # what is not there
    ("distill.py teacher=absent", ["no denoiser at absent"]),
    ("train.py start=absent", ["no denoiser at absent"]),
    ("distill.py dataset=image_folder dataset.path=absent", ["dataset.path=absent is not a directory"]),
    ("distill.py dataset=image_folder dataset.path=~/absent-here", ["absent-here is not a directory"]),
    ("distill.py dataset=image_folder", ["dataset.path=<folder>"]),
    ("train.py dataset=cifar10", ["CIFAR-10 is not in dataset.path=data", "dataset.download=true"]),
    ("train.py dataset=lsun_church128", ["church_outdoor_train_lmdb"]),
    ("train.py dataset=huggingface", ["dataset.path is missing"]),
    ("train.py imports=[no_such_module]", ["no_such_module", "PYTHONPATH"]),
    ("train.py output_root=/dev/null/outputs", ["/dev/null is no directory", "output_root=<directory>"]),
]


@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_one_line_and_nothing_written(told, workplace, command, words):
    before = {path for path in workplace.rglob("*") if "cache" not in path.parts}
    status, err = told(*command.split(" "))
    assert status == 2
    assert err.count("\n") == 1 and err.startswith("error: ") and all(word in err for word in words), err
    assert {path for path in workplace.rglob("*") if "cache" not in path.parts} <= before


def test_a_folder_without_classes_has_no_classifier(run, workplace):
    folder = workplace / "photos"
    folder.mkdir()
    for k in range(3):
        Image.new("L", (9, 9), 80 * k).save(folder / f"{k}.png")
    overrides = ["dataset=image_folder", f"dataset.path={folder}", "dataset.image_size=8", "dataset.image_channels=1"]
    status, _, err = run("train.py", "experiment=smoke", *overrides, "name=photos")
    assert status == 2 and "needs labels" in err and err.count("\n") == 1
    assert not (workplace / "outputs" / "photos").exists()
    status, _, err = run("train.py", "experiment=smoke", *overrides, "name=photos", "metrics=none")
    assert status == 0, err


def test_a_teacher_of_another_kind_is_refused(smoke, told):
    teacher = f"teacher={smoke / 'teacher' / 'denoiser'}"
    for override, words in {
        "parameterization=v": "parameterization 'x', configured 'v'",
        "network.ch=64": "network.block_out_channels [32, 64], configured [64, 128]",
        "schedule=cosine_zero_snr": "schedule",
    }.items():
        status, err = told("distill.py", teacher, override)
        assert status == 2 and words in err and err.count("\n") == 1


def test_a_student_continues_only_from_its_own_step_count(smoke, told):
    status, err = told("distill.py", f"teacher={smoke / 'steps-0004' / 'denoiser'}")
    assert status == 2 and "start the plan at 4" in err


def test_nan_stops_and_keeps_the_last_good_checkpoint(run, workplace):
    command = ("train.py", "experiment=smoke", "name=nan", "parameterization=eps", "metrics=none")
    status, _, err = run(*command, "training.learning_rate=1e30", "training.gradient_clip=null", "weighting=constant")
    assert status == 2 and "is not finite at update" in err and "logsnr in [" in err and "Traceback" not in err
    assert not (workplace / "outputs" / "nan" / "teacher" / "denoiser").exists()
