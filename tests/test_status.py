"""`pdistill status`: a finished run, one that stopped in a stage, one that is written, and a damaged one."""

import os
from pathlib import Path

import pytest
from finished_runs import make_run

from pdistill.commands import status
from pdistill.errors import UserError
from pdistill.files import locked

LOG = "step,steps_0002/loss\n50,0.5\n100,0.4\n"


def test_a_line_for_each_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run("done", {"teacher": 4.0, "steps-0004": 4.56789})
    for name in ("stopped", "written"):
        run = make_run(name, {"teacher": 4.0, "steps-0004": 5.0})
        (run / "summary.json").unlink()
        (run / "steps-0002").mkdir()
        (run / "steps-0002" / "last.ckpt").touch()
    (run / "csv" / "version_0").mkdir(parents=True)
    (run / "csv" / "version_0" / "metrics.csv").write_text(LOG)
    damaged = make_run("damaged", {"teacher": 4.0})
    (damaged / "teacher" / "metrics.json").write_text("{")
    for path in [run, *run.rglob("*")]:
        os.utime(path, (0, path.stat().st_mtime - 7200))

    with locked(Path("outputs/.written.lock")):
        status.main([])
    lines = [line.split(maxsplit=5) for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["damaged", "damaged"],
        ["done", "finished"],
        ["stopped", "stopped"],
        ["written", "running"],
    ]
    assert lines[0][5].startswith("outputs/damaged/teacher/metrics.json is damaged")
    assert lines[1][5] == "4 steps, fid_classifier 4.568"
    assert lines[2][5] == "4 steps, fid_classifier 5; training steps-0002"
    assert lines[3][2:] == ["2", "h", "ago", "4 steps, fid_classifier 5; training steps-0002, update 100"]


def test_no_runs(tmp_path):
    with pytest.raises(UserError, match="holds no runs: give the directory that they are in"):
        status.main([str(tmp_path)])
