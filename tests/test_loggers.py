"""What W&B is told, read back from an offline run's file with wandb's own record types."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from wandb_workspaces.reports.v2 import Report

from pdistill import wandb_report
from pdistill.errors import UserError

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
    for name in ("loss", "learning_rate", "fid_classifier", "samples"):
        assert {f"teacher/{name}", f"steps_0002/{name}"} <= keys
    assert {"teacher/loss_by_logsnr/0_5", "summary", "comparison"} <= keys
    assert {"parameterization", "steps", "seed"} <= config
    assert {"provenance"} <= summary
    described = {a.name: json.loads(a.metadata) for a in artifacts if a.type == "denoiser"}
    assert described["watched-teacher"]["parent"] is None
    student = described["watched-steps_0002"]
    assert student["parent"] == "teacher" and student["provenance"]["num_steps"] == 2 and student["fid_classifier"] > 0


def test_wandb_report(monkeypatch):
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path: runs))
    saved = []
    monkeypatch.setattr(Report, "save", lambda report: saved.append(report))
    monkeypatch.setattr(Report, "url", "https://wandb.example/report")
    runs = [SimpleNamespace(summary={"teacher/fid": 2.0, "steps_0002/fid": 3.0, "steps_0002/loss": 0.1})]
    assert wandb_report.main("us/digits") == "https://wandb.example/report"
    (grid,) = saved[0].blocks
    assert "summary:steps_0002/fid" in grid.runsets[0].visible_columns
    assert [metric.name for metric in grid.panels[0].metrics] == ["teacher/fid", "steps_0002/fid"]
    assert {"steps_0002/samples", "comparison"} <= set(grid.panels[3].media_keys)
    runs.clear()
    with pytest.raises(UserError, match="no run of us/digits has a figure"):
        wandb_report.main("us/digits")
    with pytest.raises(UserError, match="give the project"):
        wandb_report.main("digits")
