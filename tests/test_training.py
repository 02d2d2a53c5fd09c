"""One stage: what it computes, and what becomes of it when it is stopped, damaged, resumed or watched."""

import copy
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import IterableDataset

from pdistill import bars
from pdistill.denoiser import Denoiser
from pdistill.errors import Interrupted, UserError
from pdistill.network import unet
from pdistill.optimizer import adamw, linear_to_zero, warm_up
from pdistill.parameterization import V
from pdistill.schedule import CosineSchedule, EdmSchedule, FlowSchedule, Schedule
from pdistill.steps import Stage
from pdistill.training import checkpoint as checkpoints
from pdistill.training.callbacks import PerUpdate
from pdistill.training.checkpoint import WholeCheckpoints
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.fit import FitSettings, accumulated_batches, filled, fit
from pdistill.training.module import Recipe
from pdistill.training.settings import Distillation, Training
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import snr_plus_one

STAGE = Stage(index=1, num_steps=4, teacher=0, teacher_steps=2, updates=6)


class Numbered(IterableDataset):
    """A dataset whose images are their positions in the stream: all that training asks of one is `batches`."""

    def batches(self, batch_size, seed, stage, rank, world, start):
        self.size, self.rank, self.world, self.start = batch_size, rank, world, start
        return self

    def __iter__(self):
        step = self.start
        while True:
            first = (step * self.world + self.rank) * self.size
            number = torch.arange(first, first + self.size, dtype=torch.uint8)
            yield {
                "image": number[:, None, None, None].expand(-1, 1, 8, 8).clone(),
                "step": step,
                "label": (number % 4).long(),
            }
            step += 1


class StopAt(PerUpdate):
    """Sends this process SIGTERM at an update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_update(self, trainer, module, update):
        if update == self.update:
            os.kill(os.getpid(), signal.SIGTERM)


class Seen(Callback):
    """Which images each update saw."""

    def __init__(self) -> None:
        self.images: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        numbers = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        self.images.setdefault(trainer.global_step + 1, []).extend(numbers)


def new_denoiser(seed: int = 0, **options) -> Denoiser:
    torch.manual_seed(seed)
    network = unet(8, 1, 1, 32, 64, [1], 1, [], **options)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    return Denoiser(network, V(), CosineSchedule())


@pytest.fixture
def denoiser() -> Denoiser:
    return new_denoiser()


def momentum(parameters, settings):
    """Somebody's own optimizer, with two groups and a state."""
    first, *others = parameters
    return torch.optim.SGD([{"params": [first]}, {"params": others}], settings.learning_rate, momentum=0.9)


def recipe(**changes) -> Recipe:
    settings = Training(batch_size=12, ema_decay=0.5, dropout=0.1, warmup_updates=3)
    return replace(Recipe(settings, snr_plus_one), **changes)


PLAIN = replace(recipe(), settings=Training(batch_size=12, ema_decay=0.5, warmup_updates=3))  # without dropout


def alike(one: Denoiser, other: Denoiser) -> bool:
    """Whether two denoisers say the same to 1e-4, which is the tolerance for another order of sums in float32."""
    torch.manual_seed(1)
    z, t, labels = torch.randn(8, 1, 8, 8), torch.rand(8), torch.arange(8) % 4
    condition = one.told(labels, torch.full((8,), 2.0)) if one.num_classes else None
    with torch.no_grad():
        a, b = (denoiser.output(z, t, condition) for denoiser in (one, other))
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def trainer(accumulate: int = 1) -> partial:
    options = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 2}
    return partial(Trainer, **options, accumulate_grad_batches=accumulate)


def settings(directory: Path, **changes) -> FitSettings:
    defaults = {"updates": 6, "num_steps": 4, "trainer": trainer(), "progress_bar": False}
    return FitSettings(directory, "teacher", **(defaults | changes))


def train(module, directory: Path, **changes) -> None:
    fit(module, ImageDataModule(Numbered(), 12, seed=0, stage=0), settings(directory, **changes))


def weights(directory: Path) -> bytes:
    return next((directory / "denoiser" / "unet").glob("*.safetensors")).read_bytes()


def stopped(module, directory: Path, update: int, **changes) -> None:
    with pytest.raises(Interrupted, match=f"stopped at update {update};"):
        train(module, directory, callbacks=[StopAt(update)], **changes)


@pytest.mark.parametrize("kind", ["teacher", "student", "own optimizer"])
def test_a_resumed_stage_is_the_same_to_the_byte(denoiser, tmp_path, kind, capsys):
    def module():
        start = copy.deepcopy(denoiser)
        if kind == "student":
            return DistillationModule(start, STAGE, recipe())
        return TeacherModule(start, recipe(optimizer=momentum if kind == "own optimizer" else adamw))

    train(module(), tmp_path / "undisturbed", trainer=trainer(2))
    stopped(module(), tmp_path / "stopped", 3, trainer=trainer(2))
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == {"last.ckpt"}
    train(module(), tmp_path / "stopped", trainer=trainer(2))
    assert weights(tmp_path / "undisturbed") == weights(tmp_path / "stopped")
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == {"cost.json", "denoiser"}
    assert capsys.readouterr().err == ""


def test_settings_that_are_left_out_are_the_modules(denoiser, tmp_path):
    teacher, student = TeacherModule(denoiser), DistillationModule(denoiser, STAGE)
    full = filled(FitSettings(tmp_path / "teacher"), teacher)
    assert (full.prefix, full.updates, full.num_steps) == ("teacher", Training().updates, 0)
    full = filled(FitSettings(tmp_path / "steps-0004"), student)
    assert (full.prefix, full.updates, full.num_steps) == ("steps_0004", 6, 4)
    with pytest.raises(UserError, match=r"no number of updates: give FitSettings\(updates="):
        filled(FitSettings(tmp_path), TeacherModule(denoiser, Recipe(Distillation())))
    with pytest.raises(UserError, match=r"no step count to be measured at: give FitSettings\(num_steps="):
        filled(FitSettings(tmp_path, metric=SimpleNamespace()), teacher)


def test_a_stage_stopped_after_its_last_update_only_saves(denoiser, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise Interrupted("killed")

    monkeypatch.setattr(Denoiser, "save", killed)
    with pytest.raises(Interrupted, match="killed"):
        train(TeacherModule(denoiser, recipe()), tmp_path, checkpoint_every_n_updates=3)
    monkeypatch.undo()
    trained, seen = TeacherModule(new_denoiser(1), recipe()), Seen()
    train(trained, tmp_path, callbacks=[seen])
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert not seen.images and cost["training_seconds"] > 0 and cost["training_images"] == 72
    assert torch.equal(trained.denoiser.network.conv_in.weight, denoiser.network.conv_in.weight)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_resuming_with_other_accumulated_batches(denoiser, tmp_path, accumulate, capsys):
    stopped(TeacherModule(denoiser, recipe()), tmp_path, 3, trainer=trainer(4))
    seen = Seen()
    train(TeacherModule(denoiser, recipe()), tmp_path, trainer=trainer(accumulate), callbacks=[seen])
    assert seen.images == {k: list(range(12 * (k - 1), 12 * k)) for k in (4, 5, 6)}
    note = capsys.readouterr().err
    assert f"accumulated batches 4 -> {accumulate}" in note and "not the same to the byte" in note
    assert note.count("\n") == 1


def test_checkpoints_survive_a_kill_between_writing_and_replacing(denoiser, tmp_path_factory, monkeypatch, capsys):
    """On another file system than the temporary directory, which is not touched."""
    home = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path_factory.mktemp("other")
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with tempfile.TemporaryDirectory(dir=home) as directory:
        directory = Path(directory)
        stopped(TeacherModule(denoiser, recipe()), directory, 3, checkpoint_every_n_updates=2)
        assert {p.name for p in directory.iterdir()} == {"last.ckpt", "previous.ckpt"}
        replacing = Path.replace

        def killed(path, target):
            if path.suffix == ".partial":
                raise Interrupted("killed")
            return replacing(path, target)

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(Interrupted, match="killed"):
            train(TeacherModule(denoiser, recipe()), directory, checkpoint_every_n_updates=4)
        monkeypatch.undo()
        (directory / ".last.ckpt.1.partial").write_bytes(b"half")
        seen = Seen()
        train(TeacherModule(denoiser, recipe()), directory, callbacks=[seen])
        assert list(seen.images) == [4, 5, 6]
        assert {p.name for p in directory.iterdir()} == {"cost.json", "denoiser"}
    assert "last.ckpt is missing; continuing from previous.ckpt" in capsys.readouterr().err


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: bytes(len(b)), flipped])
def test_a_damaged_checkpoint_falls_back_on_the_one_before(denoiser, tmp_path, damage, capsys):
    stopped(TeacherModule(denoiser, recipe()), tmp_path, 3, checkpoint_every_n_updates=2)
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    seen = Seen()
    with pytest.raises(Interrupted):
        train(TeacherModule(denoiser, recipe()), tmp_path, callbacks=[seen, StopAt(4)])
    assert list(seen.images) == [3, 4]
    told = capsys.readouterr().err
    assert f"{last} is damaged" in told and "continuing from previous.ckpt" in told and told.count("\n") == 1
    last.write_bytes(damage(last.read_bytes()))
    previous.write_bytes(damage(previous.read_bytes()))
    with pytest.raises(UserError, match=r"last\.ckpt is damaged.* and .*previous\.ckpt is damaged.*delete") as caught:
        train(TeacherModule(denoiser, recipe()), tmp_path)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_do_not_fit_are_refused(denoiser, tmp_path):
    stopped(TeacherModule(denoiser, recipe()), tmp_path, 2)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del content["pdistill"]  # as 0.1.0 wrote them
    WholeCheckpoints().save_checkpoint(content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt was written by version 0\.1\.0"):
        train(TeacherModule(denoiser, recipe()), tmp_path)
    content["foreign"] = SimpleNamespace()
    WholeCheckpoints().save_checkpoint(content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="may keep tensors, numbers"):
        train(TeacherModule(denoiser, recipe()), tmp_path)


def test_the_bar_after_a_resume(denoiser, tmp_path, monkeypatch, capsys):
    stopped(TeacherModule(denoiser, recipe()), tmp_path, 4)
    monkeypatch.setattr(bars, "SECONDS_TO_FIRST_LINE", 0)
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(bars, "SLOWER", 0)
    train(TeacherModule(denoiser, recipe()), tmp_path, progress_bar=True, trainer=trainer(2))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher: ")]
    assert any(line.startswith("teacher: 83% 5/6 [00:0") for line in lines)
    assert lines[-1].startswith("teacher: 100% 6/6 [00:0") and not any("?" in line for line in lines[-2:])


def test_a_screen_that_nobody_reads_stops_nothing(denoiser, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    train(TeacherModule(denoiser, recipe()), tmp_path, progress_bar=True, updates=2)
    assert (tmp_path / "denoiser").exists()


class InterruptWorkers(PerUpdate):
    """What Ctrl-C does to the processes that make batches."""

    def on_update(self, trainer, module, update):
        if update == 1:
            self.workers = multiprocessing.active_children()
            for worker in self.workers:
                os.kill(worker.pid, signal.SIGINT)


def test_signals_do_not_end_the_processes_that_make_batches(denoiser, tmp_path):
    data, interrupt = ImageDataModule(Numbered(), 12, seed=0, stage=0, num_workers=1), InterruptWorkers()
    fit(TeacherModule(denoiser, recipe()), data, settings(tmp_path, callbacks=[interrupt]))
    assert interrupt.workers and (tmp_path / "denoiser").exists()


class Poison(Callback):
    """A weight that is not a number, from an update on."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 4:
            module.denoiser.network.conv_out.bias.data.fill_(math.nan)


def test_a_loss_that_is_not_finite_ends_the_stage_and_keeps_the_checkpoint(denoiser, tmp_path):
    with pytest.raises(UserError, match=r"teacher: the loss is not finite at update 5, logsnr in \["):
        train(TeacherModule(denoiser, recipe()), tmp_path, callbacks=[Poison()], checkpoint_every_n_updates=1)
    seen = Seen()
    train(TeacherModule(denoiser, recipe()), tmp_path, callbacks=[seen])
    assert list(seen.images) == [5, 6]


def test_a_metric_while_training(denoiser, tmp_path):
    asked = []

    class Metric:
        name = "score"

        def measure(self, measured, num_steps, device):
            assert not measured.training
            asked.append((measured is module.ema, num_steps))
            return 1.0

    module = TeacherModule(denoiser, recipe())
    train(module, tmp_path, metric=Metric(), measure_every_n_updates=2)
    assert asked == [(True, 4)] * 3 and module.denoiser.training  # after 0, 2 and 4 of 6 updates


class Endless(Schedule):
    """Somebody's own schedule, infinite at both ends."""

    def __call__(self, t):
        return 2 * torch.log((1 - t) / t)


@pytest.mark.parametrize("schedule", [CosineSchedule(-math.inf), FlowSchedule(), EdmSchedule(), Endless()])
def test_the_teachers_loss_is_finite_at_the_ends_of_time(denoiser, schedule, monkeypatch):
    ends = torch.tensor([0.0, 1.0, 1 - 2**-24])
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: ends)
    denoiser.schedule = schedule
    losses, logsnr = TeacherModule(denoiser, recipe()).losses({"image": torch.zeros(3, 1, 8, 8)})
    assert losses.isfinite().all() and logsnr[0] > logsnr[1]


def test_the_schedule_says_when_its_teacher_trains(denoiser):
    denoiser.schedule = EdmSchedule(mean=0.0, std=0.1)
    _, logsnr = TeacherModule(denoiser, recipe()).losses({"image": torch.zeros(500, 1, 8, 8)})
    ln_sigma = -logsnr / 2
    assert abs(ln_sigma.mean()) < 0.02 and abs(ln_sigma.std() - 0.1) < 0.02


def test_hidden_labels_in_a_dict(denoiser):
    denoiser.null_label = 4
    module = TeacherModule(denoiser, recipe(label_dropout=0.25))
    other, label = torch.arange(4000.0), torch.zeros(4000, dtype=torch.long)
    condition = module.condition_of({"condition": {"label": label, "other": other}})
    assert condition["other"] is other and set(condition["label"].tolist()) == {0, 4}
    assert 0.22 < (condition["label"] == 4).float().mean() < 0.28
    assert set(module.condition_of({"label": label}).tolist()) == {0, 4}


def test_gradients_are_clipped_in_their_own_scale(denoiser, monkeypatch):
    """A fused optimizer undoes float16's scale of the loss itself, after the clipping."""
    module = TeacherModule(denoiser, recipe())
    optimizer = module.configure_optimizers()["optimizer"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = SimpleNamespace(scaler=scaler)
    monkeypatch.setattr(TeacherModule, "trainer", SimpleNamespace(precision_plugin=plugin))
    loss = module.losses({"image": torch.zeros(4, 1, 8, 8)})[0].mean()
    expected = torch.stack(
        [g.norm() for g in torch.autograd.grad(loss, list(denoiser.parameters()), retain_graph=True)]
    )
    scaler.scale(loss).backward()
    module.configure_gradient_clipping(optimizer)
    torch.testing.assert_close(module.gradient_norm, expected.norm())
    scaler.step(optimizer)


def test_the_parts_of_a_batch():
    assert accumulated_batches(64, 2) == 1
    assert accumulated_batches(64, 2, least=2) == 2
    assert accumulated_batches(64, 1, most_images=10) == 8
    with pytest.raises(UserError, match=r"training\.batch_size=10 cannot be divided into 4 equal parts"):
        accumulated_batches(10, 4, key="training.batch_size")


def test_learning_rates():
    assert [warm_up(4)(k) for k in (0, 3, 100)] == [0.25, 1, 1] and warm_up(0)(0) == 1
    assert [linear_to_zero(4)(k) for k in (0, 2, 4, 9)] == [1, 0.5, 0, 0]


def test_no_room_for_a_checkpoint(tmp_path, monkeypatch):
    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    content = {"state_dict": {}, "loops": {}, "optimizer_states": [], "global_step": 1}
    WholeCheckpoints().save_checkpoint(content, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written .*No space left.* continues from"):
        WholeCheckpoints().save_checkpoint({"a": 2}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="the same command starts this stage anew"):
        WholeCheckpoints().save_checkpoint({"a": 2}, tmp_path / "other" / "last.ckpt")
    (tmp_path / "other").rmdir()
    assert WholeCheckpoints().load_checkpoint(tmp_path / "last.ckpt") == content
    assert checkpoints.there_is_one(tmp_path) and len(list(tmp_path.iterdir())) == 1
