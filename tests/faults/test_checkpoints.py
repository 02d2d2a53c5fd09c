"""Checkpoints that are cut off or changed: found by their checksums, and the one before is used."""

import random
import shutil

import pytest
import torch
from tally import faults
from test_training import new_denoiser, recipe, stopped, train, weights

from pdistill.errors import UserError
from pdistill.training.checkpoint import WholeCheckpoints
from pdistill.training.teacher import TeacherModule


def module() -> TeacherModule:
    return TeacherModule(new_denoiser(), recipe())


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A stage that was stopped at update 5 of 6, with checkpoints of updates 5 and 4, and the weights undisturbed."""
    home = tmp_path_factory.mktemp("checkpoints")
    train(module(), home / "undisturbed")
    stopped(module(), home / "stage", 5, checkpoint_every_n_updates=4)
    return home / "stage", weights(home / "undisturbed")


def resumes(directory, undisturbed: bytes, capsys) -> None:
    """The run goes on from the checkpoint before, says so in a line, and ends as ever."""
    capsys.readouterr()
    train(module(), directory)
    told = capsys.readouterr().err
    assert "continuing from previous.ckpt, the checkpoint before" in told and told.count("\n") == 1, told
    assert weights(directory) == undisturbed


@pytest.mark.parametrize("tenth", [0, 5, 9, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3, 4, 6, 7, 8))])
def test_cut_at_every_tenth_of_its_length(stage, tmp_path, tenth, capsys):
    with faults("a checkpoint cut off at a tenth of its length"):
        shutil.copytree(stage[0], tmp_path / "stage")
        last = tmp_path / "stage" / "last.ckpt"
        content = last.read_bytes()
        last.write_bytes(content[: len(content) * tenth // 10])
        resumes(tmp_path / "stage", stage[1], capsys)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("flips", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_bit_that_flipped(tmp_path, capsys, flips):
    """Anywhere, and as often in the headers and the table of contents, which checksums do not cover: either it is found
    and the checkpoint before is used, or what is loaded is what was saved."""
    weights, places = {f"name {k}": torch.full((30, k), k / 7) for k in range(12)}, random.Random(flips)
    content = {"state_dict": weights, "loops": {}, "optimizer_states": [], "global_step": 3}
    last = tmp_path / "last.ckpt"
    for _ in range(2):
        WholeCheckpoints().save_checkpoint(content, last)
    written = last.read_bytes()
    tables = range(written.index(b"PK\x01\x02"), len(written))
    headers = [i + k for i in range(len(written)) if written[i : i + 4] == b"PK\x03\x04" for k in range(30)]
    for k in range(flips):
        place = places.choice([range(len(written)), tables, headers][k % 3])
        with faults("a checkpoint with a flipped bit"):
            flipped = bytearray(written)
            flipped[place] ^= 1 << places.randrange(8)
            last.write_bytes(flipped)
            loaded = WholeCheckpoints().load_checkpoint(last)
            assert same(loaded, content), place
            last.unlink(missing_ok=True)
            (tmp_path / "damaged.ckpt").unlink(missing_ok=True)
    capsys.readouterr()


def test_both_are_damaged(stage, tmp_path):
    with faults("both checkpoints damaged"):
        shutil.copytree(stage[0], tmp_path / "stage")
        for name in ("last.ckpt", "previous.ckpt"):
            (tmp_path / "stage" / name).write_bytes(b"PK")
        with pytest.raises(
            UserError, match=r"last\.ckpt is damaged .* and .*previous\.ckpt is damaged .*: delete"
        ) as told:
            train(module(), tmp_path / "stage")
        assert "\n" not in str(told.value)
