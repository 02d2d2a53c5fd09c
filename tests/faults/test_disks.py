"""Disks that are full or may not be written to."""

import re
import shutil

import pytest
from chains import CHAIN, finished, remount
from tally import faults

from pdistill.errors import UserError
from pdistill.training.checkpoint import WholeCheckpoints

slow = pytest.mark.slow
ROOM = re.compile(
    "No space left on device|file write failed|make room|Read-only file system|may be written to|readonly"
)


def holding(count: int) -> dict:
    """The parts of a checkpoint."""
    import torch

    return {"state_dict": {"weights": torch.zeros(count)}, "loops": {}, "optimizer_states": [], "global_step": 3}


def test_a_checkpoint_on_a_full_disk(disk):
    """In this process: the line says what becomes of the work, and the checkpoint before is there."""
    with disk("size=1m") as full, faults("a full disk, at a checkpoint"):
        WholeCheckpoints().save_checkpoint(holding(50_000), full / "last.ckpt")
        with pytest.raises(UserError, match=r"cannot be written .* continues from the checkpoint before"):
            WholeCheckpoints().save_checkpoint(holding(400_000), full / "last.ckpt")
        assert [p.name for p in full.iterdir()] == ["last.ckpt"]
        assert len(WholeCheckpoints().load_checkpoint(full / "last.ckpt")["state_dict"]["weights"]) == 50_000


@slow
@pytest.mark.parametrize("share", [k / 12 for k in range(12)])
def test_a_chain_on_a_disk_that_fills(chain, disk, share):
    """Whatever it is that finds no room, a checkpoint, a denoiser, a picture or the report."""
    chain.undisturbed()
    whole = chain.work / "home-1" / "outputs"
    needed = sum(-(-p.stat().st_size // 4096) * 4096 for p in whole.rglob("*") if p.is_file()) + 100_000
    with disk(f"size={max(16_384, int(share * needed))}") as home, faults("a disk that fills in a chain"):
        process = chain.start(home)
        assert process.ended() in (1, 2), process.said
        assert ROOM.search(process.error), process.said
        stages = finished(home / "outputs" / "chain")
        remount(home, "size=100m")
        chain.finish(home)
        assert all(finished(home / "outputs" / "chain")[k] == v for k, v in stages.items())


@slow
@pytest.mark.parametrize("size", ["32k", "300k", "600k"])
def test_caches_on_a_full_disk(chain, disk, size, monkeypatch):
    """Of the classifier, of what the images are like to it, and of images."""
    chain.undisturbed()
    with disk(f"size={size}") as cache, faults("a full disk, at a cache"):
        home = chain.home()
        words = [*CHAIN, "name=cached"]
        process = chain.server.start(home, *words, fault=["caches_in", str(cache)])
        assert process.ended() in (1, 2), process.said
        assert ROOM.search(process.error), process.said
        remount(cache, "size=100m")
        process = chain.start(home, "halving", fault=["caches_in", str(cache)])
        assert process.ended() == 0, process.said
        chain.check(home)


@slow
def test_exports_and_reports_on_a_full_disk(chain, disk):
    chain.undisturbed()
    with disk("size=100m") as home:
        shutil.copytree(chain.work / "home-1" / "outputs", home / "outputs")
        (home / "outputs" / "chain" / "report.html").unlink()
        used = sum(-(-p.stat().st_size // 4096) * 4096 for p in home.rglob("*") if p.is_file())
        remount(home, f"size={used + 60_000}")
        for words in (("export", "outputs/chain/steps-0001/denoiser"), ("report", "outputs/chain", "outputs/chain")):
            with faults(f"a full disk, at pdistill {words[0]}"):
                process = chain.server.start(home, *words)
                assert process.ended() in (1, 2), process.said
                assert ROOM.search(process.error), process.said
                chain.check(home) if (home / "outputs" / "chain" / "report.html").exists() else None
                assert not list(home.rglob("*.partial"))


@slow
def test_an_output_that_may_not_be_written_to(chain, disk):
    """From the start, or when a run is resumed: root may write everywhere but to a disk mounted read-only."""
    chain.undisturbed()
    with disk("size=100m") as home:
        remount(home, "ro")
        with faults("a read-only output"):
            process = chain.start(home)
            assert process.ended() in (1, 2), process.said
            assert ROOM.search(process.error), process.said
        remount(home, "rw")
        process = chain.start(home, fault=["kill_before_change", 60])
        assert process.ended() == -9, process.said
        remount(home, "ro")
        with faults("a read-only output, of a run that is resumed"):
            process = chain.start(home)
            assert process.ended() in (1, 2), process.said
            assert ROOM.search(process.error), process.said
            remount(home, "rw")
            chain.finish(home)
