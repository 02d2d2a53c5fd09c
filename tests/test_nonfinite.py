"""skip_nonfinite: an update whose gradient is not finite changes nothing, is counted, and too many end the stage."""

import math
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from test_training import STAGE, StopAt, momentum, new_denoiser, recipe, train, trainer, weights
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pdistill.errors import UserError
from pdistill.optimizer import adamw
from pdistill.training import nonfinite
from pdistill.training.callbacks import PerUpdate
from pdistill.training.distillation import DistillationModule
from pdistill.training.teacher import TeacherModule

skipping = partial(recipe, skips=3)


class Spoil(Callback):
    """A gradient that is not a number at some updates: it comes out of the backward pass of one of their batches."""

    def __init__(self, *updates: int) -> None:
        self.updates = updates

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        bias = module.denoiser.network.conv_out.bias
        if trainer.global_step + 1 in self.updates and batch_idx % trainer.accumulate_grad_batches == 0:
            self.handle = bias.register_hook(lambda gradient: gradient * math.nan)

    def on_after_backward(self, trainer, module):
        if hasattr(self, "handle"):
            self.handle.remove()


class States(PerUpdate):
    """Weights, EMA, optimizer and learning rate after every update."""

    def __init__(self) -> None:
        self.states: dict[int, list[torch.Tensor]] = {}
        self.rates: list[float] = []

    def on_update(self, trainer, module, update):
        optimizer = trainer.optimizers[0]
        held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        self.states[update] = [t.detach().clone() for t in [*module.parameters(), *held]]
        self.rates.append(optimizer.param_groups[0]["lr"])

    def changed(self, update: int) -> bool:
        before, after = self.states[update - 1], self.states[update]
        return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "precision"), [(adamw, None), (momentum, None), (adamw, "float16"), (momentum, "float16")]
)
def test_an_update_is_left_out(tmp_path, optimizer, precision, capsys):
    """By fused optimizers, others and float16's scaler; with accumulated batches, one of which is at fault."""
    states, made = States(), trainer(2)
    if precision:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        made = partial(Trainer, **made.keywords, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    module = TeacherModule(new_denoiser(), skipping(optimizer=optimizer))
    train(module, tmp_path, trainer=made, callbacks=[Spoil(3, 5), states])
    assert {u: states.changed(u) for u in range(2, 7)} == {2: True, 3: False, 4: True, 5: False, 6: True}
    assert states.rates[:3] == pytest.approx([2e-3 / 3, 1e-3, 1e-3])  # the schedule goes on
    assert all(t.isfinite().all() for t in load_file(next(tmp_path.rglob("*.safetensors"))).values())
    told = capsys.readouterr().err
    assert "teacher: 2 updates were left out" in told and "at most 1 in a row, the last at update 5" in told


def test_where_nothing_is_left_out_the_result_is_the_same_to_the_byte(tmp_path):
    for name, kind in {"without": recipe, "with": skipping}.items():
        train(DistillationModule(new_denoiser(), STAGE, kind()), tmp_path / name)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_a_resumed_stage_counts_on(tmp_path, capsys):
    spoilt = [3, 4, 6]

    def module():
        return TeacherModule(new_denoiser(), skipping())

    train(module(), tmp_path / "undisturbed", callbacks=[Spoil(*spoilt)])
    told = capsys.readouterr().err
    with pytest.raises(BaseException, match="stopped at update 3;"):
        train(module(), tmp_path / "stopped", callbacks=[Spoil(*spoilt), StopAt(3)])
    train(module(), tmp_path / "stopped", callbacks=[Spoil(*spoilt)])
    assert weights(tmp_path / "undisturbed") == weights(tmp_path / "stopped")
    assert capsys.readouterr().err == told and "3 updates" in told and "at most 2 in a row" in told


def test_too_many_in_a_row_end_the_stage_and_keep_the_checkpoint(tmp_path):
    callbacks = [Spoil(3, 4, 5)]
    with pytest.raises(UserError, match=r"3 updates in a row, the last at update 5, .* skip_nonfinite_in_a_row=6"):
        train(TeacherModule(new_denoiser(), skipping()), tmp_path, callbacks=callbacks, checkpoint_every_n_updates=2)
    assert (tmp_path / "last.ckpt").exists()
    more = skipping(skips=6)  # the run may go on with the larger number, from update 4
    train(TeacherModule(new_denoiser(), more), tmp_path, callbacks=[Spoil(5)])


def test_without_it_the_first_ends_the_stage(tmp_path):
    with pytest.raises(UserError, match=r"not finite at update 2, in the gradient.*skip_nonfinite=true"):
        train(TeacherModule(new_denoiser(), recipe()), tmp_path, callbacks=[Spoil(2)])


def test_the_average_on_a_device_that_nobody_waits_for():
    """The form of other devices than the CPU, on it: a share of the step that is 0 or as ever."""
    ema, weights = ([torch.randn(3, 2), torch.randn(4)] for _ in range(2))
    expected = [e.clone() for e in ema]
    get_ema_multi_avg_fn(0.9)(tuple(expected), tuple(weights), None)
    nonfinite.lerp(ema, weights, 0.9, torch.tensor(True))
    assert not any(torch.equal(e, x) for e, x in zip(ema, expected, strict=True))
    nonfinite.lerp(ema, weights, 0.9, torch.tensor(False))
    torch.testing.assert_close(ema, expected)
