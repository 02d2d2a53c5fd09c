"""Two processes: one set of weights, one loss, one decision to stop; what one process would have trained."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from test_training import PLAIN, STAGE, Seen, alike, new_denoiser, recipe, train, trainer, weights

from pdistill import processes
from pdistill.denoiser import Denoiser
from pdistill.method.conversion import Conversion
from pdistill.method.guidance import Guidance
from pdistill.method.halving import Halving
from pdistill.method.multistep_consistency import MultistepConsistency
from pdistill.method.parallel_decoding import ParallelDecoding
from pdistill.method.tract import Tract
from pdistill.optimizer import adamw
from pdistill.steps import Stage
from pdistill.training.distillation import DistillationModule
from pdistill.training.teacher import TeacherModule

METHODS = {
    "teacher": None,
    "halving": (Halving(), STAGE),
    "tract": (Tract(), STAGE),
    "multistep": (MultistepConsistency(8, 16), STAGE),
    "parallel": (ParallelDecoding(), Stage(1, 4, 0, 2, 6, counts=(4, 2))),
    "guidance": (Guidance(1, 5), replace(STAGE, called="guided")),
    "conversion": (Conversion(), replace(STAGE, called="converted")),
}


def module_of(kind: str):
    """A stage without dropout, whose masks are each part's own.

    Adam's eps keeps it from making whole steps of gradients that are nothing but rounding, as of a layer that begins at
    zero: they would differ in their sign.
    """
    made = replace(PLAIN, optimizer=partial(adamw, eps=1e-4))
    denoiser = new_denoiser(num_classes=5)
    denoiser.null_label = 4
    if METHODS[kind] is None:
        return TeacherModule(denoiser, replace(made, label_dropout=0.3))
    method, stage = METHODS[kind]
    return DistillationModule(denoiser, stage, made, method)


SCRIPT = """
import hashlib, json, os, signal, sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from test_ddp import METHODS, module_of
from test_training import STAGE, Numbered, StopAt, new_denoiser, recipe, settings

from pdistill import processes
from pdistill.errors import Interrupted, UserError
from pdistill.method.guidance import Guidance
from pdistill.method.tract import Tract
from pdistill.training import callbacks, execution
from pdistill.training.data import ImageDataModule
from pdistill.training.distillation import DistillationModule
from pdistill.training.fit import fit, make_trainer, start_processes
from pdistill.training.settings import Execution
from pdistill.training.teacher import TeacherModule

HOME = Path(sys.argv[1])
TWO = partial(Trainer, accelerator="cpu", devices=2, strategy="ddp", log_every_n_steps=3)


class Memory(Logger):
    name = version = None
    def __init__(self): self.logged = []
    def log_hyperparams(self, *args, **kwargs): ...
    def log_metrics(self, metrics, step=None): self.logged.append((step, metrics["teacher/loss"]))


class Losses(Callback):
    def __init__(self): self.losses = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx): self.losses += outputs["losses"].tolist()


class BadShare(TeacherModule):
    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and int(batch["step"]) == 1:
            outputs["losses"] = outputs["losses"] * torch.nan  # the gradients are as they were
        return outputs


class Buckets(Callback):  # what DDP sends, by its own words
    def on_train_end(self, trainer, module):
        ddp = trainer.strategy.model
        words = ddp._get_ddp_logging_data()
        self.sent = {k: words[k] for k in ("gradient_as_bucket_view", "broadcast_buffers", "find_unused_parameters")}
        self.sent["bytes"] = sum(map(int, words["rebuilt_bucket_sizes"].split(",")))
        self.sent["trained"] = sum(p.numel() * p.element_size() for p in module.denoiser.parameters())
        self.sent["ignored"] = sorted({name.split(".")[0] for name in ddp.parameters_to_ignore})
        self.sent["buffers"] = len(ddp.modules_buffers)


class Held(Callback):  # the shares of a stage's weights, and of the optimizer's state, that are here
    def on_train_end(self, trainer, module):
        states = [v for s in trainer.optimizers[0].state.values() for v in s.values() if v.ndim]
        parts = {"student": [*module.denoiser.parameters()], "teacher": [*module.teacher.parameters()]}
        parts |= {"ema": [*module.ema.parameters()], "optimizer": states}
        local = {k: sum(t.to_local().numel() for t in tensors) for k, tensors in parts.items()}
        self.shares = {k: local[k] / sum(t.numel() for t in tensors) for k, tensors in parts.items()}


class Mean:
    name = "mean"
    def __init__(self): self.values = []
    def measure(self, denoiser, num_steps, device):
        with torch.no_grad():
            self.values.append(float(denoiser(torch.ones(1, 1, 8, 8), torch.ones(1), torch.ones(1).long()).mean()))
        return self.values[-1]


class BadGradient(TeacherModule):
    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and int(batch["step"]) == 1:
            outputs["loss"] = outputs["loss"] * torch.nan
        return outputs


def run(module, name, trainer=TWO, **changes):
    data = ImageDataModule(Numbered(), 12, seed=0, stage=0)
    fit(module, data, settings(HOME / name, trainer=trainer, **changes))


def digest(module):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()


def outcome(error, module, name, **changes):
    try:
        run(module, name, **changes)
    except error as caught:
        return str(caught)


start_processes(make_trainer(settings(HOME, trainer=TWO)))
told = {"world": processes.world_size()}
memory, losses, student = Memory(), Losses(), DistillationModule(new_denoiser(processes.rank()), STAGE, recipe())
buckets = Buckets()
run(student, "whole", loggers=[memory], callbacks=[losses, buckets])
told |= {"digest": digest(student), "logged": memory.logged, "losses": losses.losses[:], "buckets": buckets.sent}
tract = DistillationModule(new_denoiser(processes.rank()), STAGE, recipe(), Tract())
run(tract, "tract")
told |= {"tract": digest(tract), "self_teacher": digest(tract.method.self_teacher)}
labelled = new_denoiser(processes.rank(), num_classes=5)
labelled.null_label = 4
guided = DistillationModule(labelled, replace(STAGE, called="guided"), recipe(), Guidance(1, 5))
run(guided, "guided", callbacks=[losses])
told |= {"guided": digest(guided), "drawn": losses.losses[36:]}
execution.compile_network = lambda network, mode: network.compile(backend="eager", fullgraph=True)
compiled = DistillationModule(new_denoiser(processes.rank()), STAGE, recipe(execution=Execution(compile=True)))
run(compiled, "compiled")
told |= {"compiled": digest(compiled)}
callbacks.SECONDS_TO_STOP = 1e-6
only_one = [StopAt(2)] if processes.rank() == 1 else []
teacher, bad = (kind(new_denoiser(processes.rank()), recipe()) for kind in (TeacherModule, BadShare))
told["stopped"] = outcome(Interrupted, teacher, "stopped", callbacks=only_one)
told["refused"] = outcome(UserError, bad, "bad")
SHARES = partial(TWO, strategy="fsdp2")
held, mean = Held(), Mean()
for kind in METHODS:
    more = {"callbacks": [held], "metric": mean, "measure_every_n_updates": 2} if kind == "halving" else {}
    run(module_of(kind), f"ddp-{kind}", updates=3)
    run(module_of(kind), f"fsdp-{kind}", SHARES, updates=3, **more)
told |= {"shares": held.shares, "measured": mean.values}
parts = partial(SHARES, accumulate_grad_batches=3, precision="bf16-mixed")
run(module_of("teacher"), "bf16", parts, updates=3)
for name in ("on-one", "on-two"):
    told[name] = outcome(Interrupted, module_of("halving"), name, trainer=SHARES, updates=3, callbacks=only_one)
run(module_of("halving"), "on-two", SHARES, updates=3)
skipping = BadGradient(new_denoiser(processes.rank()), recipe(skips=2))
run(skipping, "skipping")
told |= {"skipping": digest(skipping), "finite": all(p.isfinite().all().item() for p in skipping.parameters())}
(HOME / f"rank-{processes.rank()}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where the two processes have been."""
    home = tmp_path_factory.mktemp("ddp")
    (home / "fits.py").write_text(SCRIPT)
    alone = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = alone | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "fits.py", str(home)]
    ended = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return home


@pytest.fixture(scope="module")
def told(home) -> list[dict]:
    return [json.loads((home / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_have_one_set_of_weights(told):
    assert told[0]["world"] == told[1]["world"] == 2
    assert told[0]["digest"] == told[1]["digest"]


def test_compiled_networks_of_two_ranks_learn_the_same(told):
    assert told[0]["compiled"] == told[1]["compiled"] == told[0]["digest"]


def test_ranks_have_one_self_teacher(told):
    assert told[0]["self_teacher"] == told[1]["self_teacher"] and told[0]["tract"] == told[1]["tract"]
    assert told[0]["self_teacher"] != told[0]["tract"]


def test_ranks_have_one_guided_student(told):
    """Of which each draws guidance of its own."""
    assert told[0]["guided"] == told[1]["guided"] and told[0]["drawn"] != told[1]["drawn"]


def test_buckets_hold_what_is_trained_alone(told):
    """No teacher, EMA or buffer; and no search for unused parameters."""
    assert told[0]["buckets"] == told[1]["buckets"]
    sent = told[0]["buckets"]
    assert sent["bytes"] == sent["trained"] > 0 and sent["buffers"] == 0
    assert sent["ignored"] == ["ema", "teacher"]
    assert sent["gradient_as_bucket_view"] and not sent["broadcast_buffers"] and not sent["find_unused_parameters"]


@pytest.mark.parametrize("kind", METHODS)
def test_two_processes_train_what_one_does(told, home, tmp_path, kind):
    """Under DDP and FSDP2, and in accumulated batches: to the rounding of float32."""
    train(module_of(kind), tmp_path / "one", updates=3)
    train(module_of(kind), tmp_path / "parts", updates=3, trainer=trainer(3))
    one = Denoiser.load(tmp_path / "one" / "denoiser")
    for other in (tmp_path / "parts", home / f"ddp-{kind}", home / f"fsdp-{kind}"):
        assert alike(one, Denoiser.load(other / "denoiser")), other.name


def test_each_process_holds_half_of_everything(told):
    for rank in told:
        assert set(rank["shares"]) == {"student", "teacher", "ema", "optimizer"}
        assert all(0.4 < share < 0.6 for share in rank["shares"].values())
    assert told[0]["measured"] == told[1]["measured"] and len(told[0]["measured"]) == 2  # of whole copies


def test_checkpoints_of_shares_are_those_of_one_device(told, home, capsys):
    assert told[0]["on-one"] == told[1]["on-one"] and "stopped at update 2" in told[0]["on-one"]
    train(module_of("halving"), home / "on-one", updates=3)
    assert "devices 2 -> 1" in capsys.readouterr().err
    undisturbed = home / "fsdp-halving" / "denoiser"
    assert alike(Denoiser.load(undisturbed), Denoiser.load(home / "on-one" / "denoiser"))
    assert weights(undisturbed.parent) == weights(home / "on-two")


def test_the_logged_loss_is_that_of_all_ranks(told):
    for k, step in enumerate((3, 6)):
        both = [loss for rank in told for loss in rank["losses"][18 * k : 18 * (k + 1)]]  # 3 updates of 6 images each
        assert told[0]["logged"][k] == told[1]["logged"][k] == pytest.approx([step, sum(both) / 36], rel=1e-5)


def test_a_signal_to_one_rank_stops_both_and_keeps_the_update(told, home):
    assert told[0]["stopped"] == told[1]["stopped"] and "the same command continues" in told[0]["stopped"]
    assert (home / "stopped" / "last.ckpt").exists()


def test_a_loss_of_one_rank_that_is_not_finite_stops_both(told):
    assert told[0]["refused"] == told[1]["refused"] and "the loss is not finite at update 2" in told[0]["refused"]


def test_a_gradient_of_one_rank_that_is_not_finite_is_left_out_by_both(told, home):
    assert told[0]["skipping"] == told[1]["skipping"] and told[0]["finite"]


def test_one_device_goes_on_where_two_stopped(told, home, capsys):
    assert processes.world_size() == 1
    done = int(told[0]["stopped"].split("update ")[1].split(";")[0])
    seen = Seen()
    train(TeacherModule(new_denoiser(), recipe()), home / "stopped", trainer=trainer(3), callbacks=[seen])
    assert seen.images == {k: list(range(12 * (k - 1), 12 * k)) for k in range(done + 1, 7)}
    assert "devices 2 -> 1, accumulated batches 1 -> 3" in capsys.readouterr().err


def test_a_process_among_several_keeps_the_memory_that_it_frees() -> None:
    """What is allocated again and again is not handed out by the system page by page each time, however large."""
    script = """
from resource import RUSAGE_SELF, getrusage
import torch
from pdistill import processes
processes.keep_memory()
for _ in range(30):  # the heap finds its size in the first ten
    before = getrusage(RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
    print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, *_, last = map(int, done.stdout.split())
    assert last < first / 10
