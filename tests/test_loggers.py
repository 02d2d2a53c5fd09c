"""What W&B is told, read back from an offline run's file with wandb's own record types."""

import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from lightning.pytorch.loggers import Logger
from PIL import Image

from pdistill.errors import Interrupted, UserError
from pdistill.training.logger import artifact_name, close, closing, log_stage, wandb_logger

BLOCK = 32768  # the file is a LevelDB log: blocks of (crc, length, type) and content, a record over one or more


def records(file: Path) -> Iterator[bytes]:
    content, position, record = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline(run, workplace):
    from wandb.proto import wandb_internal_pb2

    status, _, err = run("distill.py", "experiment=smoke", "steps.plan=[4,2]", "logger=wandb", "name=watched")
    assert status == 0, err
    (file,) = (workplace / "outputs" / "watched" / "wandb").glob("offline-run-*/run-*.wandb")
    keys, artifacts, config, summary = set(), [], set(), set()
    for content in records(file):
        record = wandb_internal_pb2.Record.FromString(content)
        keys |= {item.nested_key[0] if item.nested_key else item.key for item in record.history.item}
        config |= {item.key for item in record.run.config.update} | {item.key for item in record.config.update}
        summary |= {(*item.nested_key, item.key)[0] for item in record.summary.update}
        if record.request.log_artifact.artifact.name:
            artifacts.append(record.request.log_artifact.artifact)
        elif record.artifact.name:
            artifacts.append(record.artifact)
    for name in ("loss", "learning_rate", "fid_classifier", "samples", "film"):
        assert {f"teacher/{name}", f"steps_0002/{name}"} <= keys
    assert {"teacher/loss_by_logsnr/0_5", "summary", "comparison"} <= keys
    assert {"parameterization", "steps", "seed"} <= config
    assert {"provenance"} <= summary
    described = {a.name: json.loads(a.metadata) for a in artifacts if a.type == "denoiser"}
    assert described["watched-teacher"]["parent"] is None
    student = described["watched-steps_0002"]
    assert student["parent"] == "teacher" and student["provenance"]["num_steps"] == 2 and student["fid_classifier"] > 0


@pytest.fixture
def stage(tmp_path) -> Path:
    """The directory of a finished stage, as far as a logger looks at it."""
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser" / "denoiser.json").write_text("{}")
    Image.new("L", (4, 4)).save(tmp_path / "samples.png")
    return tmp_path


def told(directory: Path) -> SimpleNamespace:
    """What an offline run's file says: names of the run and of the artifacts, exit status."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (directory / "wandb").glob("offline-run-*/run-*.wandb")
    deadline, parsed = time.monotonic() + 20, []
    while not any(r.HasField("exit") for r in parsed) and time.monotonic() < deadline:  # W&B's own process writes it
        time.sleep(0.1)
        parsed = [wandb_internal_pb2.Record.FromString(content) for content in records(file)]
    artifacts = [r.artifact.name or r.request.log_artifact.artifact.name for r in parsed]
    return SimpleNamespace(
        name=next(r.run.display_name for r in parsed if r.run.display_name),
        artifacts=[name for name in artifacts if name and not name.startswith(("run-", "source-"))],
        exit_code=next(r.exit.exit_code for r in parsed if r.HasField("exit")),
        preempting=any(r.HasField("preempting") for r in parsed),
    )


@pytest.mark.parametrize("name", ["größe", "x" * 300, "ключ/" * 60, "plain"])
def test_any_name_of_a_run_is_one_of_an_artifact(stage, name, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = wandb_logger(str(stage), name, "pdistill")
    row = {"fid": 2.0, "parent": "teacher"}
    log_stage([logger], "steps-0016", row, stage, name)
    close([logger])
    seen = told(stage)
    assert len(seen.name) <= 128 and seen.exit_code == 0 and not seen.preempting
    (artifact,) = seen.artifacts
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", artifact) and artifact == artifact_name(name, "steps_0016")
    assert name != "plain" or (seen.name, artifact) == ("plain", "plain-steps_0016")


def test_artifacts_of_different_names_stay_apart():
    names = [artifact_name(run, stage) for run in ("größe", "gräße", "x" * 200, "x" * 201) for stage in ("a", "b")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("error", [UserError("no"), RuntimeError("a fault"), Interrupted("stopped")])
def test_how_a_run_ended(stage, error, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = wandb_logger(str(stage), "ends", "pdistill")
    with pytest.raises(type(error)), closing([logger]):
        raise error
    stopped = isinstance(error, Interrupted)
    seen = told(stage)
    assert (seen.exit_code, seen.preempting) == ((130, True) if stopped else (1, False))


def test_what_wandb_does_not_accept_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "bogus")
    wandb.teardown()
    with pytest.raises(
        UserError, match=r"refuses the key .*WANDB_API_KEY.*`wandb login`.*WANDB_MODE=offline"
    ) as refused:
        wandb_logger(str(tmp_path), "a", "pdistill")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    for project in ("a/b", "", "x" * 129):
        with pytest.raises(UserError, match=r"logger\.project="):
            wandb_logger(str(tmp_path), "a", project)
    with pytest.raises(UserError, match=r"W&B does not open a run \(.*[Tt]ag") as options:
        wandb_logger(str(tmp_path), "a", "pdistill", tags=["x" * 100])
    assert all("\n" not in str(caught.value) for caught in (refused, options))


def test_a_server_that_has_gone_does_not_end_the_run(stage, capsys):
    class Broken(Logger):
        name = version = None

        def log_hyperparams(self, *args, **kwargs): ...

        def log_metrics(self, *args, **kwargs):
            raise wandb.errors.CommError("no route to the server")

    log_stage([Broken()], "teacher", {"fid": 1.0, "parent": None}, stage, "run")
    assert "Broken did not take everything (no route to the server)" in capsys.readouterr().err
