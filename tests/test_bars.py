"""Progress bars: on a terminal, in a file, on a stream that nobody reads, and one inside another."""

import io
import os
import select
import sys

import pytest
import torch
from clock import Clock
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from pdistill import bars
from pdistill.bars import Bar, bar
from pdistill.dataset import image_folder
from pdistill.generation import Draw, generate
from pdistill.interop.diffusers import Pipeline
from pdistill.metrics import distances
from pdistill.metrics.shares import my_batches


@pytest.fixture
def log(capsys):
    """log() -> what stderr got since the last call; it is no terminal."""
    return lambda: capsys.readouterr().err


def work(clock: Clock, seconds_each: float, items, title: str, **options) -> None:
    for _ in bar(items, title, **options):
        clock.now += seconds_each


def test_a_log_gets_a_line_after_three_seconds_then_one_in_ten_and_the_last(clock, log):
    work(clock, 0.25, range(160), "caching", unit="image")
    text = log()
    lines = text.splitlines()
    assert len(lines) == 5 and "\r" not in text
    assert lines[0].startswith("caching: 8% 12/160 [00:03<00:37, ")
    assert lines[-1] == "caching: 100% 160/160 [00:40<00:00,  4.00image/s]"


def test_short_work_leaves_nothing_in_a_log(clock, log):
    work(clock, 0.3, range(3), "reading")
    assert log() == ""
    work(clock, 0.4, range(3), "reading")
    assert log().splitlines() == ["reading: 100% 3/3 [00:01<00:00,  2.50it/s]"]


def test_without_a_total_it_counts(clock, log):
    work(clock, 2, iter("abc"), "looking for images", unit="file")
    assert log().splitlines() == ["looking for images: 2 file [00:04]", "looking for images: 3 file [00:06]"]


def test_the_time_left_after_a_resume_is_of_this_sitting(clock, log):
    with bar((), "teacher", 1000, "update", initial=900) as progress:
        for _ in range(5):
            clock.now += 1
            progress.update()
    assert log().splitlines() == [
        "teacher: 90% 903/1000 [00:03<01:37,  1.00update/s]",
        "teacher: 90% 905/1000 [00:05<01:35,  1.00update/s]",
    ]


def test_a_failure_leaves_the_last_state(clock, log):
    with pytest.raises(ZeroDivisionError), bar((), "training", 10, "update") as progress:
        clock.now += 2
        progress.update(4)
        raise ZeroDivisionError
    assert log().startswith("training: 40% 4/10 ")


def test_a_bar_within_another_moves_that_one_and_is_not_shown(clock, log):
    for _ in bar(range(2), "fid, 4 steps", unit="batch"):
        for _ in range(2):  # the second has no share left
            for _ in bar(range(4), "sampling in 4 steps", unit="step", within=True):
                clock.now += 5
    text = log()
    lines = [line.split(", ")[1] for line in text.splitlines()]
    assert "fid" in text and "sampling" not in text
    assert lines[0] == "4 steps: 12% 0/2 [00:05<00:35" and lines[-1].startswith("4 steps: 100% 2/2 [01:15<00:00")
    assert not Bar.around
    work(clock, 2, range(1), "sampling", within=True)
    assert "sampling: 100% 1/1" in log()


@pytest.fixture
def talkative(monkeypatch) -> None:
    """A line at every update, and after the shortest work."""
    for seconds in ("SECONDS_TO_APPEAR", "SECONDS_TO_FIRST_LINE", "SECONDS_BETWEEN_LINES", "SLOWER"):
        monkeypatch.setattr(bars, seconds, 0)


def counts(text: str, title: str) -> list[str]:
    return [line.removeprefix(title).split(" [")[0] for line in text.splitlines() if line.startswith(title)]


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "unipc"])
def test_a_batch_of_many_steps_does_not_stand_still(log, talkative, tiny, sampler):
    """A single batch of samples may take hours."""
    list(generate(tiny(), range(3), Draw(4, sampler=sampler)))
    assert counts(log(), "sampling in 4 steps: ")[:4] == ["25% 1/4", "50% 2/4", "75% 3/4", "100% 4/4"]
    for batch in my_batches(6, 3, "fid, 4 steps"):
        list(generate(tiny(), batch, Draw(4, sampler=sampler)))
    text = log()
    assert "sampling" not in text and counts(text, "fid, 4 steps: ")[:4] == ["12% 0/2", "25% 0/2", "38% 0/2", "50% 1/2"]


def test_a_pipeline_of_others_moves_the_bar_too(log, talkative):
    network = UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    pipeline = Pipeline(DDPMPipeline(network, DDPMScheduler(10)), "somewhere")
    for batch in my_batches(2, 2, "pipeline"):
        list(pipeline.generate(batch, Draw(2)))
    assert counts(log(), "pipeline: ")[:2] == ["50% 0/1", "100% 1/1"]


def test_metrics_of_many_features_do_not_stand_still(log, talkative, monkeypatch):
    monkeypatch.setattr(distances, "PART", 50)
    random = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(100, 4, generator=random) for _ in range(2))
    distances.measures(fake, real, distances.FrechetDistance(*distances.moments(real)), None, 3, extrapolate=True)
    text = log()
    assert counts(text, "FID of resamplings: ")[:2] == ["17% 0/3", "33% 1/3"]
    assert counts(text, "FID of smaller sets: ")[-1] == "100% 15/15" and counts(text, "KID: ")[-1] == "100% 20/20"
    assert counts(text, "precision and recall: ")[0] == "12% 1/8" and "covariance: 50% 1/2" in text


def test_a_few_large_photos_do_not_stand_still(log, talkative, monkeypatch, tmp_path):
    monkeypatch.setenv("PDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (k, 0, 0)).save(tmp_path / "photos" / f"{k}.png")
    image_folder(str(tmp_path / "photos"), 8)
    assert counts(log(), "caching image_folder:photos: ")[:3] == ["33% 1/3", "67% 2/3", "100% 3/3"]


def test_a_terminal_gets_a_bar_that_goes_away(clock, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(bars, "SECONDS_TO_APPEAR", 0)
        for leave in (False, True):
            with bar((), "teacher", 10, "update", initial=4, leave=leave) as progress:
                clock.now += 2
                progress.update(6)
        monkeypatch.setattr(sys, "stderr", sys.__stderr__)
        shown = ""
        while select.select([controller], [], [], 0.2)[0]:
            shown += os.read(controller, 100_000).decode()
    os.close(controller)
    states = [state for state in shown.split(bars.ERASED) if "teacher" in state]
    assert all(state.startswith("teacher: 100%|") for state in states)
    assert all("| 10/10 [00:02<00:00,  3.00update/s]" in state for state in states)
    assert shown.endswith("\n") and shown.count("\n") == 1  # of the one that stays


class Gone(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError


class GoneTerminal(Gone):
    """A terminal that was closed."""

    def isatty(self):
        return True


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Gone(), GoneTerminal()])
def test_a_stream_that_nobody_reads_ends_nothing(clock, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    work(clock, 5, range(10), "training", leave=True)
    assert clock.now == 50


def test_a_stream_closed_on_the_way_ends_nothing(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for k in bar(range(10), "training"):
        clock.now += 5
        if k == 4:
            log.close()
    assert clock.now == 50


def test_only_the_main_process_shows_it(clock, log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work(clock, 5, range(3), "training")
    assert log() == ""
    work(clock, 5, range(3), "caching", everywhere=True)
    assert log().startswith("caching: ")
