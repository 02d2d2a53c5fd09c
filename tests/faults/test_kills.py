"""SIGKILL and SIGTERM at moments that nobody chose: the same command again ends as if nothing had happened."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from chains import METHODS, finished
from tally import faults

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("FAULTS_KILLS", 30))


def kept(before: dict, after: dict) -> bool:
    """Whether every stage that was finished is as it was, and was not trained again."""
    return all(after.get(stage) == file for stage, file in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_sigkill_at_random_moments(chain, method):
    moments, (_, seconds) = random.Random(method), chain.undisturbed(method)
    kills = 0
    while kills < KILLS:
        home, killed = chain.home(), 0
        directory, stages = home / "outputs" / "chain", {}
        process = chain.start(home, method)
        while process.ended(moments.uniform(0, 1.1 * seconds)) is None and kills + killed < KILLS:
            process.kill()
            if process.ended() != -signal.SIGKILL:  # it ended in that moment
                break
            assert kept(stages, finished(directory))
            killed, stages = killed + 1, finished(directory)
            process = chain.start(home, method)
        with faults(f"SIGKILL at a random moment, {method}", killed):
            assert process.ended() == 0, process.said
            assert kept(stages, finished(directory))
            chain.check(home, method)
        kills += killed


def test_sigkill_before_a_change_on_the_disk(chain, tmp_path):
    """Before every k-th of the chain's writes, renames and deletions, evenly spread."""
    chain.undisturbed()
    count = tmp_path / "count"
    process = chain.start(chain.home(), fault=["count_changes", str(count)])
    assert process.ended() == 0, process.said
    total = int(count.read_text())
    for k in range(KILLS):
        number = 1 + k * total // KILLS
        home = chain.home()
        process = chain.start(home, fault=["kill_before_change", number])
        assert process.ended() == -signal.SIGKILL, process.said
        stages = finished(home / "outputs" / "chain")
        with faults("SIGKILL before a file is changed"):
            chain.finish(home)
            assert kept(stages, finished(home / "outputs" / "chain")), process.said


def test_sigterm_with_grace(chain):
    """It ends in a line that says what becomes of the work, and in time."""
    moments, (_, seconds) = random.Random("grace"), chain.undisturbed()
    tried = 0
    while tried < 10:
        home = chain.home()
        process = chain.start(home)
        if process.ended(moments.uniform(0.1, seconds)) is not None:
            continue
        tried += 1
        with faults("SIGTERM with grace"):
            process.kill(signal.SIGTERM)
            status = process.ended(30)
            assert status in (130, 143, 0), (status, process.said)  # 0: it was about to end
            if status:
                assert "the same command continues" in process.error
            chain.finish(home)


def test_sigterm_and_then_sigkill(chain):
    """The grace was too short: the kill meets a checkpoint that is being written, or a process on its way out."""
    moments, (_, seconds) = random.Random("no grace"), chain.undisturbed()
    for _ in range(10):
        home = chain.home()
        process = chain.start(home)
        if process.ended(moments.uniform(0.1, seconds)) is None:
            process.kill(signal.SIGTERM)
            process.ended(moments.uniform(0, 0.2))
            process.kill()
        with faults("SIGTERM, and SIGKILL soon after"):
            process.ended()
            chain.finish(home)


def test_sigkill_while_workers_make_batches(chain):
    """Whose copies of what the killed process held do not keep the next one out."""
    moments, (_, seconds) = random.Random("workers"), chain.undisturbed()
    for _ in range(5):
        home = chain.home()
        process = chain.start(home, "halving", "num_workers=1")
        if process.ended(moments.uniform(0.3, 0.9) * seconds) is None:
            process.kill()
        with faults("SIGKILL of a run with workers"):
            process.ended()
            finish_with_workers(chain, home)


def finish_with_workers(chain, home: Path) -> None:
    process = chain.start(home, "halving", "num_workers=1")
    assert process.ended() == 0, process.said
    for file in ("config.yaml", "run.json"):  # which say num_workers
        shutil.copy(chain.work / "home-1" / "outputs" / "chain" / file, home / "outputs" / "chain" / file)
    chain.check(home)
