"""Students while they grow: frames and metrics of a training, and the film strips of the report."""

import copy
import json
import re
from pathlib import Path

import pytest
from finished_runs import make_run
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import STAGE, new_denoiser, recipe, stopped, train, trainer, weights

from pdistill.errors import UserError
from pdistill.generation import Draw, generate
from pdistill.report import page
from pdistill.report.grids import save_grid
from pdistill.training.distillation import DistillationModule
from pdistill.training.teacher import TeacherModule


class Watching:
    """What a stage is told to draw and measure, with a list of what it drew and measured."""

    name = "score"

    def __init__(self) -> None:
        self.drawn, self.measured = [], 0

    def draw(self, denoiser, file: Path) -> None:
        self.drawn.append(file.name)
        save_grid(next(generate(denoiser, range(2), Draw(4))), file, nrow=1)

    def measure(self, denoiser, num_steps, device) -> float:
        self.measured += 1
        return 0.5

    @property
    def settings(self) -> dict:
        watch = {"metric": self, "measure_every_n_updates": 4, "draw": self.draw, "draw_every_n_updates": 2}
        return watch | {"checkpoint_every_n_updates": 3}


def student() -> DistillationModule:
    return DistillationModule(copy.deepcopy(new_denoiser()), STAGE, recipe())


def film(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (directory / "film").iterdir()}


def test_a_film_changes_nothing_and_survives_a_stop(tmp_path):
    train(student(), tmp_path / "unwatched")
    watching = Watching()
    train(student(), tmp_path / "watched", **watching.settings)
    assert weights(tmp_path / "unwatched") == weights(tmp_path / "watched")
    assert watching.drawn == ["0000000.png", "0000002.png", "0000004.png"]  # the sixth update is the last
    frames = film(tmp_path / "watched")
    assert set(frames) == {*watching.drawn, "0000000.json", "0000004.json"} and watching.measured == 2
    assert len({frames[name] for name in watching.drawn}) == 3  # each is of other weights

    again, tensorboard = Watching(), TensorBoardLogger(str(tmp_path), name="log", version="")
    stopped(student(), tmp_path / "stopped", 4, loggers=[tensorboard], **again.settings)
    (tmp_path / "stopped" / "last.ckpt").unlink()  # as if killed after the fourth update: back to the third
    (tmp_path / "stopped" / "film" / ".0000004.png.1.partial").write_bytes(b"half")
    train(student(), tmp_path / "stopped", loggers=[tensorboard], **again.settings)
    assert again.drawn == watching.drawn and again.measured == 2  # nothing twice
    assert film(tmp_path / "stopped") == frames and weights(tmp_path / "stopped") == weights(tmp_path / "watched")
    tensorboard.experiment.flush()
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.step for event in events.Images("teacher/film")] == [0, 2, 4]
    assert [(event.step, event.value) for event in events.Scalars("teacher/score")] == [(0, 0.5), (4, 0.5)]


def test_samples_that_are_not_finite_yet_are_no_frame(tmp_path):
    def draw(denoiser, file: Path) -> None:
        raise UserError("not finite")

    train(student(), tmp_path, draw=draw, draw_every_n_updates=2)
    assert (tmp_path / "denoiser").exists() and not (tmp_path / "film").exists()


def test_the_film_of_a_run_ends_with_its_finished_stages(smoke):
    for stage, updates in (("teacher", 40), ("steps-0004", 15), ("steps-0001", 20)):
        frames = sorted((smoke / stage / "film").iterdir())
        assert [int(frame.stem) for frame in frames] == list(range(0, updates + 1, 5))
        last, grid = Image.open(frames[-1]), Image.open(smoke / stage / "samples.png")
        for k in range(4):  # a column of the first images of the grid
            tiles = last.crop((2, 50 * k + 2, 50, 50 * k + 50)), grid.crop((50 * k + 2, 2, 50 * k + 50, 50))
            assert ImageChops.difference(*tiles).getbbox() is None
    text = (smoke / "report.html").read_text()
    assert "While they trained" in text and 'alt="1 step, after 0 updates"' in text


@pytest.mark.parametrize("measured", [True, False])
def test_a_strip_shows_updates_and_values(tmp_path, measured):
    run = make_run("run", {"teacher": 5.5, "steps-0002": 7.25}, root=tmp_path)  # 15 updates a stage
    for update in (0, 10, 15):
        save_grid(next(generate(new_denoiser(), range(2), Draw(1))), run / "steps-0002" / "film" / f"{update:07d}.png")
    if measured:
        (run / "steps-0002" / "film" / "0000010.json").write_text(json.dumps({"fid_classifier": 9.125}))
    page.write([run], tmp_path / "page.html")
    captions = re.findall('updates"[^>]*><figcaption>(.*?)</figcaption>', (tmp_path / "page.html").read_text())
    assert captions == ["0", "10<br><b>9.12</b>" if measured else "10", "15<br><b>7.25</b>"]
    (run / "steps-0002" / "film" / "0000010.json").write_text("[1")
    with pytest.raises(UserError, match=r"0000010\.json is damaged"):
        page.write([run], tmp_path / "page.html")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_network_passes_are_those_of_training_alone(tmp_path, accumulate):
    """Of halving: the student's update is 3, and its teacher's two steps are 2; whatever parts a batch is taken in."""

    def passes(directory: Path) -> float:
        return json.loads((directory / "cost.json").read_text())["network_passes"]

    stopped(student(), tmp_path / "student", 3, trainer=trainer(accumulate), **Watching().settings)
    train(student(), tmp_path / "student", trainer=trainer(accumulate), **Watching().settings)
    assert passes(tmp_path / "student") == 6 * (3 + 2)
    train(TeacherModule(new_denoiser(), recipe()), tmp_path / "teacher", trainer=trainer(accumulate))
    assert passes(tmp_path / "teacher") == 6 * 3
