"""Every mistake is one line on stderr and a non-zero exit, before anything is written."""

import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("script", "overrides", "words"),
    [
        ("distill.py", ["weighting=foo"], ["weighting/foo", "truncated_snr"]),
        ("distill.py", ["sede=1"], ["sede"]),
        ("distill.py", ["steps.plan=[32,5]"], ["5 does not divide 32"]),
        ("distill.py", ["steps.plan=[32]"], ["at least two"]),
        ("distill.py", ["parameterization=eps"], ["eps cannot be distilled", "allow_unstable=true"]),
        ("distill.py", ["teacher=absent"], ["no denoiser at absent"]),
        (
            "distill.py",
            ["dataset=image_folder", "dataset.path=absent"],
            ["dataset.path=absent is not a directory"],
        ),
        ("distill.py", ["dataset=image_folder"], ["dataset.path=<folder>"]),
        ("train.py", ["training.batch_size=63", "trainer=ddp_cpu"], ["batch_size=63", "multiple of 2"]),
        ("train.py", ["network.ch=20"], ["multiple of 32"]),
        ("train.py", ["max_batch_per_device=0"], ["max_batch_per_device=0", "at least 1"]),
        ("train.py", ["metrics.teacher_curve={steps:[0],samplers:[ddim]}"], ["teacher_curve", "e.g."]),
        ("train.py", ["dataset=cifar10"], ["CIFAR-10 is not in dataset.path=data", "dataset.download=true"]),
        ("train.py", ["dataset=lsun_church128"], ["church_outdoor_train_lmdb"]),
        ("train.py", ["dataset=huggingface"], ["dataset.path is missing"]),
        ("train.py", ["name=../escape"], ["one directory name"]),
        ("train.py", ["training.updates=many"], ["training.updates=many", "whole number"]),
        ("train.py", ["training.ema_decay=1.5"], ["training.ema_decay=1.5", "or null"]),
        ("distill.py", ["trainer.accelerator=abacus"], ["abacus"]),
        ("sample.py", [], ["denoiser=<directory> is missing"]),
        ("evaluate.py", [], ["denoiser=<directory> is missing"]),
        ("evaluate.py", ["devices=0"], ["devices=0 must be a whole number, at least 1"]),
        ("distill.py", ["teacher=outputs/a=b"], ["teacher=outputs/a=b", "needs quotes"]),
    ],
)
def test_one_line_and_nothing_written(run, workplace, script, overrides, words):
    before = set(workplace.rglob("*"))
    status, _, err = run(script, *overrides)
    assert status == 2
    assert err.count("\n") == 1 and all(word in err for word in words), err
    assert set(workplace.rglob("*")) <= before


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


def test_a_teacher_of_another_kind_is_refused(smoke, run):
    teacher = f"teacher={smoke / 'teacher' / 'denoiser'}"
    for override, words in {
        "parameterization=v": "parameterization 'x', configured 'v'",
        "network.ch=64": "network.block_out_channels [32, 64], configured [64, 128]",
        "schedule=cosine_zero_snr": "schedule",
    }.items():
        status, _, err = run("distill.py", teacher, override)
        assert status == 2 and words in err and err.count("\n") == 1


def test_a_student_continues_only_from_its_own_step_count(smoke, run):
    status, _, err = run("distill.py", f"teacher={smoke / 'steps-0004' / 'denoiser'}")
    assert status == 2 and "start the plan at 4" in err


def test_nan_stops_and_keeps_the_last_good_checkpoint(run, workplace):
    command = ("train.py", "experiment=smoke", "name=nan", "parameterization=eps", "metrics=none")
    status, _, err = run(*command, "training.learning_rate=1e30", "training.gradient_clip=null", "weighting=constant")
    assert status == 2 and "is not finite at update" in err and "logsnr in [" in err and "Traceback" not in err
    assert not (workplace / "outputs" / "nan" / "teacher" / "denoiser").exists()


def test_a_damaged_checkpoint_is_named(run, workplace):
    checkpoint = workplace / "outputs" / "damaged" / "teacher" / "last.ckpt"
    command = ("train.py", "experiment=smoke", "name=damaged", "metrics=none")
    assert run(*command)[0] == 0
    (checkpoint.parent / "denoiser").rename(checkpoint.parent / "moved")
    (checkpoint.parent / "metrics.json").unlink()
    checkpoint.write_bytes(b"PK\x03\x04 half a file")
    status, _, err = run(*command)
    assert status == 2 and "last.ckpt is damaged" in err and "delete it" in err
