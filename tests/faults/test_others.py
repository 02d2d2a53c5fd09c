"""Two processes on one run, no memory, a clock that jumps, images that change under a run."""

import os
import random
import re
import shutil
import time

import numpy as np
import pytest
from chains import CHAIN, content
from PIL import Image
from tally import faults
from test_training import new_denoiser, recipe, train

from pdistill.errors import UserError
from pdistill.training.teacher import TeacherModule

slow = pytest.mark.slow


class NoMemory(TeacherModule):
    """As torch's allocators say it."""

    error: BaseException

    def losses(self, batch):
        if int(batch["step"]) == 1:
            raise self.error
        return super().losses(batch)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore lines"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."
        ),
        MemoryError(),
    ],
)
def test_no_memory_is_a_line_with_advice(tmp_path, error):
    with faults("out of memory in a stage"):
        module = NoMemory(new_denoiser(), recipe())
        module.error = error
        advice = r"^teacher: out of memory \(.*\): max_batch_per_device=6 takes its 12 images in parts, and adds"
        with pytest.raises(UserError, match=advice) as told:
            train(module, tmp_path)
        assert "continues from the last checkpoint" in str(told.value) and "\n" not in str(told.value)


@slow
@pytest.mark.parametrize(("stage", "kind"), [(0, "cuda"), (0, "cpu"), (1, "cpu"), (2, "cuda")])
def test_no_memory_in_a_chain(chain, stage, kind):
    chain.undisturbed()
    home = chain.home()
    with faults("out of memory in a stage"):
        process = chain.start(home, fault=["out_of_memory", stage, kind])
        assert process.ended() == 1, process.said
        assert "out of memory" in process.error and "max_batch_per_device=4" in process.error
        chain.finish(home)


@slow
def test_two_processes_on_one_run(chain):
    """At once, and one while the other is at work: one is refused in a line, the other ends as ever."""
    moments, (_, seconds) = random.Random("two"), chain.undisturbed()
    for k in range(4):
        home = chain.home()
        with faults("a second process on a run"):
            first = chain.start(home)
            first.ended(0 if k == 0 else moments.uniform(0, 0.8 * seconds))
            second = chain.start(home)
            statuses = {first.ended(), second.ended()}
            refused = [p for p in (first, second) if p.ended()]
            assert statuses in ({0, 2}, {0}), (first.said, second.said)  # or the second came when the first had ended
            assert all("is being written by another process" in p.error for p in refused)
            chain.check(home)


@slow
def test_a_clock_that_jumps(chain):
    """By years, to and fro; and files whose times are in the future or before all of that."""
    moments, (_, seconds) = random.Random("clock"), chain.undisturbed()
    for k in range(4):
        home = chain.home()
        with faults("a clock that jumps"):
            process = chain.start(home, fault=["clock_jumps", k])
            process.ended(moments.uniform(0.2, 0.8) * seconds)
            process.kill()
            process.ended()
            for file in home.rglob("*"):
                moment = time.time() + moments.choice((-1, 1)) * 1e8
                os.utime(file, (moment, moment))
            process = chain.start(home, fault=["clock_jumps", -k])
            assert process.ended() == 0, process.said
            chain.check(home)


def folder(home, images: int):
    for k in range(images):
        (home / "photos" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(home / "photos" / str(k % 2) / f"{k}.png")


@slow
def test_images_that_change_under_a_run(chain):
    """While it runs: it has what it read at its start. Between two starts: it is refused, until they are restored."""
    words = [*CHAIN, "dataset=image_folder", "dataset.path=photos", "dataset.image_size=8", "dataset.image_channels=1"]
    _, seconds = chain.undisturbed()
    undisturbed = chain.home()
    folder(undisturbed, 40)
    process = chain.server.start(undisturbed, *words)
    assert process.ended() == 0, process.said
    expected = content(undisturbed / "outputs" / "chain")
    for moment in (0.3, 0.5, 0.7):
        home = chain.home()
        shutil.copytree(undisturbed / "photos", home / "photos")
        process = chain.server.start(home, *words)
        with faults("images that change while a run is at work"):
            process.ended(moment * seconds)
            changed = home / "photos" / "0" / "0.png"
            before, times = changed.read_bytes(), changed.stat()
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(changed)
            process.ended(0.1 * seconds)
            process.kill()
            process.ended()
        with faults("images that changed between two starts"):
            process = chain.server.start(home, *words)
            if process.ended() != 0:  # else nothing had been read when they changed: it is a run of the new ones
                assert re.search("was begun with other data|images changed while", process.error)
                changed.write_bytes(before)
                os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
                process = chain.server.start(home, *words)
                assert process.ended() == 0, process.said
                assert content(home / "outputs" / "chain") == expected
