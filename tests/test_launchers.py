"""Clusters: who started how many processes, what Slurm is told of a job that it stopped, and launchers of sweeps.

The slow tests start real processes: torchrun on two nodes, srun, submitit, joblib, Optuna, and a Slurm of two nodes on
this machine, where its packages are. Each is compared, byte for byte, with the same run without a launcher.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_runs import make_run
from slurm import cluster, missing
from test_chain import hashes

from pdistill import processes
from pdistill.commands import launching, stopping
from pdistill.commands.complaints import not_installed
from pdistill.errors import Interrupted, UserError
from pdistill.processes import Launched

ROOT = Path(__file__).parent.parent
TINY = ["experiment=smoke", "training.updates=6", "steps.plan=[2,1]", "metrics=none"]
LONG = ["experiment=smoke", "steps.plan=[2,1]", "metrics=none", "training.updates=60", "checkpoint_every_n_updates=5"]
OURS = ("SLURM", "OMPI", "PMI", "TORCHELASTIC", "PDISTILL_SW", "SUBMITIT")
ALONE = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "ENVIRONMENT": "BATCH"}
SRUN = BATCH | {"SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def without_launcher() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(OURS) and k not in (*ALONE, "ENVIRONMENT")}


@pytest.fixture
def started(monkeypatch):
    """started(RANK="1") puts what a launcher says into this process's environment, and nothing else of that kind."""

    def started(**variables: str) -> None:
        for name in set(os.environ) - set(without_launcher()):
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    started()
    return started


@pytest.mark.parametrize(
    ("variables", "expected", "rank"),
    [
        ({}, None, 0),
        (TORCHRUN, Launched("torchrun", 2, 4), 3),
        (TORCHRUN | SRUN, Launched("torchrun", 2, 4), 3),
        (SRUN | {"SLURM_PROCID": "2"}, Launched("srun", 2, 4), 2),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}, Launched("srun", 1, 2), 0),
        (BATCH, None, 0),
        (BATCH | {"LOCAL_RANK": "1", "NODE_RANK": "0"}, None, 1),  # of Lightning, in a batch script
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, Launched("mpirun", 1, 4), 2),
    ],
)
def test_who_started_how_many(started, variables, expected, rank):
    started(**variables)
    assert processes.launched() == expected and processes.rank() == rank


@pytest.mark.parametrize(
    ("variables", "asked", "words"),
    [
        (
            TORCHRUN,
            (1, 2),
            "torchrun started 2 processes on each of 2 nodes, and keys asks for 2 processes on one node",
        ),
        (TORCHRUN | {"WORLD_SIZE": "2"}, (1, 1), "2 processes on one node, and keys asks for 1 process on one node"),
        (SRUN, (2, 8), "srun started 2 processes on each of 2 nodes, and keys asks for 8 processes on each of 2"),
        (SRUN | {"SLURM_NTASKS": "3"}, (2, 1), "srun started 3 processes on 2 nodes: start as many on every node"),
        ({}, (2, 1), "nothing has started processes on them: start this with srun, or with torchrun --nnodes 2"),
        (BATCH, (1, 4), "put srun before the command"),
    ],
)
def test_wrong_counts(started, variables, asked, words):
    started(**variables)
    with pytest.raises(UserError, match=words):
        launching.check_counts(*asked, "keys")


@pytest.mark.parametrize(
    ("variables", "asked"),
    [(TORCHRUN, (2, 2)), (SRUN, (2, 2)), ({}, (1, 8)), ({"NODE_RANK": "1", "MASTER_ADDR": "n1"}, (2, 8))],
)
def test_right_counts(started, variables, asked):
    started(**variables)
    launching.check_counts(*asked, "keys")


def test_wrong_counts_are_said_in_a_line(told, started):
    def refused(*words: str) -> str:
        status, err = told(*words)
        assert status == 2 and err.count("\n") == 1, err
        return err

    assert "trainer.num_nodes=2 trainer.devices=2 asks for 2 nodes" in refused(
        "train.py", *TINY, "name=no", "trainer=ddp_cpu", "trainer.num_nodes=2"
    )
    assert "put srun before the command" in refused(
        "train.py", *TINY, "name=no", "trainer=slurm", "trainer.accelerator=cpu", "trainer.precision=32-true"
    )
    started(**TORCHRUN | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    assert "trainer.num_nodes=1 trainer.devices=1 asks for" in refused("train.py", *TINY, "name=no")
    assert "leave torchrun out" in refused("train.py", "-m", *TINY, "name=no", "seed=0,1")


def test_launchers_that_are_not_installed():
    named = not_installed("Unknown plugin class : 'hydra_plugins.x'", ["hydra/launcher=joblib"])
    assert named == "hydra/launcher=joblib is not installed: pip install 'pdistill[launchers]'"
    named = not_installed("In 'hydra/config': Could not find 'hydra/sweeper/optuna'\n\nAvailable", [])
    assert named == "hydra/sweeper=optuna is not installed: pip install 'pdistill[optuna]'"
    assert not_installed("Could not find 'dataset/optuna'", []) is None


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """Where a scontrol on PATH notes its calls; it says what stands in `state`, and fails with what is in `fault`."""
    home = tmp_path / "bin"
    home.mkdir()
    program = home / "scontrol"
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then cat {home}/state; exit; fi\n'
        f'if [ -e {home}/fault ]; then cat {home}/fault >&2; exit 1; fi\necho "$@" >> {home}/calls\n'
    )
    program.chmod(0o755)
    (home / "state").write_text("   JobState=RUNNING Reason=None\n")
    (home / "calls").write_text("")
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    return home


@pytest.fixture
def handlers_stay():
    before = {number: signal.getsignal(number) for number in stopping.ASKED_AGAIN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_slurm_is_told(started, scontrol, handlers_stay):
    def said(number: int) -> str:
        return stopping.requeued(Interrupted("stopped", number))

    assert said(signal.SIGUSR1) == "" and not (scontrol / "calls").read_text()  # not under Slurm
    started(**SRUN)
    assert said(signal.SIGINT) == "" and stopping.requeued(UserError("wrong")) == ""
    assert said(signal.SIGUSR1) == said(signal.SIGTERM) == "; Slurm runs job 7 again"
    started(**SRUN, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert "job 5_2 again" in said(signal.SIGUSR1)
    assert (scontrol / "calls").read_text().splitlines() == ["requeue 7", "requeue 7", "requeue 5_2"]
    started(**SRUN)
    (scontrol / "state").write_text("   JobState=COMPLETING Reason=None\n")  # cancelled, or out of time
    assert said(signal.SIGTERM) == ""
    (scontrol / "fault").write_text("Requested operation is presently disabled for job 7\n")
    assert "does not run job 7 again (Requested operation is presently disabled for job 7)" in said(signal.SIGUSR1)
    assert len((scontrol / "calls").read_text().splitlines()) == 3


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="session")
def launched(workplace):
    """launched(["train.py", ...], RANK="1") -> a Popen in the workplace, under a launcher's environment."""

    def launched(command: list[str], before: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
        environment = without_launcher() | {"PDISTILL_CACHE": str(workplace / "cache"), "OMP_NUM_THREADS": "1"}
        program = [*before, sys.executable, str(ROOT / command[0]), *command[1:]]
        options = {"cwd": workplace, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(program, env=environment | variables, **options)

    return launched


@pytest.fixture(scope="session")
def two(launched, workplace) -> dict[str, str]:
    """The hashes of a teacher that two processes of Lightning made."""
    process = launched(["train.py", *TINY, "trainer=ddp_cpu", "name=two_by_lightning"])
    assert process.wait(300) == 0, process.communicate()
    return hashes(workplace / "outputs" / "two_by_lightning")


@contextlib.contextmanager
def namespaces():
    """Two network namespaces that see each other: their names, devices and the first one's address."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    names, devices = ("pdistill-a", "pdistill-b"), ("pdistill-va", "pdistill-vb")
    do = lambda *words: subprocess.run(["ip", *words], check=True)  # noqa: E731
    try:
        for name in names:
            do("netns", "add", name)
        do("link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for k, (name, device) in enumerate(zip(names, devices, strict=True)):
            do("link", "set", device, "netns", name)
            do("-n", name, "addr", "add", f"10.231.0.{k + 1}/24", "dev", device)
            do("-n", name, "link", "set", device, "up")
            do("-n", name, "link", "set", "lo", "up")
        yield names, devices, "10.231.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def torchrun(node: int, address: str) -> tuple[str, ...]:
    words = ("--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", f"--master-addr={address}")
    return (sys.executable, "-m", "torch.distributed.run", *words, "--master-port=29751", "--no-python")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "namespaces"])
def test_torchrun_on_two_nodes(launched, workplace, two, place):
    """One run directory, to the byte that of two processes on one node; wrong counts are one line of one process."""
    words = ["train.py", *TINY, "trainer=ddp_cpu", "trainer.devices=1"]

    def on_two_nodes(*more: str) -> tuple[list[int], list[tuple[str, str]]]:
        nodes = [launched([*words, *more], (*prefixes[k], *torchrun(k, address)), **variables[k]) for k in range(2)]
        said = [node.communicate(timeout=300) for node in nodes]
        return [node.returncode for node in nodes], said

    with namespaces() if place == "namespaces" else contextlib.nullcontext((None, None, "127.0.0.1")) as net:
        names, devices, address = net
        prefixes = [("ip", "netns", "exec", name) for name in names] if names else [(), ()]
        variables = [{"GLOO_SOCKET_IFNAME": device} for device in devices] if devices else [{}, {}]
        statuses, said = on_two_nodes("trainer.num_nodes=2", f"name=torchrun_{place}")
        assert statuses == [0, 0], said
        assert hashes(workplace / "outputs" / f"torchrun_{place}") == two
        assert "teacher:" in said[0][0] and "teacher:" not in said[1][0]
        statuses, said = on_two_nodes(f"name=refused_{place}")
    assert all(statuses) and not (workplace / "outputs" / f"refused_{place}").exists()
    assert sum("and trainer.num_nodes=1 trainer.devices=1 asks for" in err for _, err in said) == 1


def srun(k: int) -> dict[str, str]:
    """As srun starts process k of two on one node."""
    variables = {"SLURM_PROCID": k, "SLURM_LOCALID": k, "SLURM_NODEID": 0, "SLURM_NTASKS": 2, "SLURM_NNODES": 1}
    variables |= {"SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_ID": 1234, "SLURM_STEP_ID": 0, "SLURM_NODELIST": "127.0.0.1"}
    return {name: str(value) for name, value in variables.items()} | {"SLURM_JOB_NAME": "run", "MASTER_PORT": "29761"}


@pytest.mark.slow
def test_a_job_that_slurm_warns(launched, workplace, scontrol):
    """SIGUSR1 to one of two processes: one checkpoint, one word to Slurm, and the same to the byte in the end."""
    words = ["train.py", *LONG, "trainer=slurm", "trainer.accelerator=cpu", "trainer.precision=32-true"]

    def start(name: str) -> list[subprocess.Popen]:
        return [launched([*words, f"name={name}"], **srun(k)) for k in range(2)]

    whole = start("undisturbed_by_slurm")
    assert [process.wait(300) for process in whole] == [0, 0], [process.communicate() for process in whole]
    ranks, checkpoint = start("warned_by_slurm"), workplace / "outputs/warned_by_slurm/teacher/last.ckpt"
    wait_for(checkpoint.exists, ranks[0])
    ranks[1].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [130, 130], said
    assert "the same command continues from there; Slurm runs job 1234 again" in said[0][1]
    assert not said[1][1].strip() and "Traceback" not in said[0][1]
    assert (scontrol / "calls").read_text() == "requeue 1234\n"
    again = start("warned_by_slurm")
    assert [process.wait(300) for process in again] == [0, 0], [process.communicate() for process in again]
    ours, theirs = (hashes(workplace / "outputs" / f"{how}_by_slurm") for how in ("warned", "undisturbed"))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_a_signal_while_it_measures(launched, workplace, trainer):
    """Outside of training, too, a run ends in a line, all its processes with it, and goes on."""
    words = ["train.py", "experiment=smoke", "training.updates=4", "metrics.num_samples=20000", f"trainer={trainer}"]
    words += [f"name=measured_{trainer}", "steps.plan=[8,1]"]
    directory = workplace / "outputs" / f"measured_{trainer}" / "teacher"
    process = launched(words)
    wait_for((directory / "denoiser").exists, process)
    time.sleep(2)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().splitlines()[-1].startswith("error: stopped; the same command"), (
        err
    )
    assert "Traceback" not in err and not (directory / "metrics.json").exists()


def needs(extra: str, *modules: str) -> pytest.MarkDecorator:
    missing = any(importlib.util.find_spec(module) is None for module in modules)
    return pytest.mark.skipif(missing, reason=f"needs the extra: pip install 'pdistill[{extra}]'")


needs_optuna, needs_launchers = needs("optuna", "optuna"), needs("launchers", "submitit", "joblib")


@pytest.fixture(scope="session")
def sweep(launched, workplace):
    """sweep("joblib", "seed=0,1") -> (exit status, stdout, stderr) of a multirun by that launcher."""

    def sweep(launcher: str, *words: str) -> tuple[int, str, str]:
        process = launched(["train.py", "-m", *TINY, f"hydra/launcher={launcher}", *words])
        out, err = process.communicate(timeout=580)
        return process.returncode, out, err

    return sweep


@needs_launchers
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_by_a_launcher(launched, sweep, workplace, launcher):
    """Each job's result is that of a single run, and those that fail stand in the table."""
    single = launched(["train.py", *TINY, "weighting=constant", f"name=single_{launcher}"])
    assert single.wait(300) == 0, single.communicate()
    words = ("weighting=snr,constant", "training.batch_size=32,-1", f"name=by_{launcher}")
    status, out, err = sweep(launcher, *words)
    assert status == 2 and "2 of 4 jobs failed" in err and "Traceback" not in err, err
    table = (workplace / out.split("sweep: ")[1].split(" ")[0]).read_text().splitlines()
    assert len(table) == 6 and sum("must be a whole number" in line for line in table) == 2
    ours, theirs = (workplace / "outputs" / name for name in (f"single_{launcher}", f"by_{launcher}-constant"))
    theirs = theirs.with_name(f"{theirs.name}-training.batch_size-32")
    assert hashes(ours) == hashes(theirs)


@needs_launchers
@pytest.mark.slow
def test_a_job_that_is_killed(launched, workplace):
    """The table waits for the others, and lists it; the same command again does what is missing."""
    words = ["train.py", "-m", *LONG, "hydra/launcher=submitit_local", "seed=0,1", "name=killed"]
    results = workplace / "outputs" / ".multirun"
    before = set(results.glob("*/00001.json"))
    process = launched(words)
    wait_for((workplace / "outputs/killed-seed-1/teacher/last.ckpt").exists, process)
    (record,) = set(results.glob("*/00001.json")) - before
    os.kill(json.loads(record.read_text())["process"][1], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "1 of 2 jobs failed: killed-seed-1" in err and "Traceback" not in err, err
    assert "its process ended before it did" in out
    assert (workplace / "outputs/killed-seed-0/teacher/metrics.json").exists()
    again = launched(words)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and "its process" not in out, err


@needs_optuna
@pytest.mark.parametrize("seeds", ["0,1,-1", "-1,-2"])
def test_a_search_among_finished_runs(launched, tmp_path, workplace, seeds):
    """The best of them is found, trials that fail are listed, and one that is tried twice stands there once."""
    for seed, value in ((0, 3.0), (1, 2.0)):
        stages = {"teacher": 2.0, "steps-0004": 3.0, "steps-0002": 3.0, "steps-0001": value}
        make_run(f"found-seed-{seed}", stages, {"seed": seed}, root=tmp_path)
    words = ["distill.py", "-m", "experiment=smoke", "hydra/sweeper=optuna", "hydra.sweeper.direction=minimize"]
    words += ["hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1"]
    process = launched([*words, f"seed=choice({seeds})", "name=found", f"output_root={tmp_path}"])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err and "must be a whole number, at least 0" in out, err
    if seeds == "0,1,-1":
        best = (tmp_path / ".multirun" / "optimization_results.yaml").read_text()
        assert "seed: 1" in best and "best_value: 2.0" in best and "1 of 3 jobs failed: found-seed--1" in err
        assert "| x | truncated_snr | 1, 0 |" in out
    else:
        assert "hydra/sweeper=optuna: No trials are completed yet" in err and "2 of 2 jobs failed" in err


@needs_optuna
@pytest.mark.slow
def test_optuna_takes_what_jobs_return(launched, workplace):
    """Three trials, of which those fail whose learning rate is out of bounds, and the best is one of the others."""
    words = [*TINY[:3], "metrics.num_samples=50", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "name=searched"]
    words += ["hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=1"]
    process = launched(["train.py", "-m", *words, "training.learning_rate=choice(0.001,-1)", "seed=choice(0,1,2)"])
    out, err = process.communicate(timeout=580)
    best = (workplace / "outputs" / ".multirun" / "optimization_results.yaml").read_text()
    runs = list((workplace / "outputs").glob("searched-*/teacher/metrics.json"))
    values = [next(v for k, v in json.loads(path.read_text()).items() if k.startswith("fid")) for path in runs]
    assert process.returncode in (0, 2) and "Traceback" not in err, err
    assert f"best_value: {min(values)}" in best and "training.learning_rate: 0.001" in best
    assert (process.returncode == 2) == ("training.learning_rate=-1" in err + out)


@pytest.mark.slow
def test_a_slurm_of_two_nodes(workplace, tmp_path, two):
    """srun on two nodes; a batch job that is warned, put back and ends as if nothing had been; a sweep by submitit."""
    if reason := missing():
        pytest.skip(reason)
    environment = without_launcher() | {"PDISTILL_CACHE": str(workplace / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1"}
    program = [sys.executable, str(ROOT / "train.py")]
    slurm = ["trainer=slurm", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    with cluster(tmp_path) as variables:
        options = {"cwd": workplace, "env": environment | variables, "capture_output": True, "text": True}
        command = ["srun", "--nodes=2", "--ntasks-per-node=1", *program, *TINY, *slurm, "name=by_srun"]
        done = subprocess.run(command, timeout=300, **options)
        assert done.returncode == 0, done.stderr
        assert hashes(workplace / "outputs" / "by_srun") == two
        script = tmp_path / "job.sh"
        words = " ".join([*program, *LONG, *slurm, "name=by_sbatch"])
        script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {words}\n")
        log = tmp_path / "job.log"
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append"]
        done = subprocess.run([*sbatch, f"--output={log}", str(script)], timeout=60, **options)
        job = done.stdout.strip()
        _until(lambda: (workplace / "outputs/by_sbatch/teacher/last.ckpt").exists(), log)
        subprocess.run(["scancel", "--signal=USR1", job], check=True, timeout=60, **options)
        _until(lambda: f"Slurm runs job {job} again" in log.read_text(), log)
        at_once = ["scontrol", "update", f"JobId={job}", "StartTime=now"]  # else after two minutes
        _until(lambda: subprocess.run(at_once, timeout=60, **options).returncode == 0, log)
        _until(lambda: (workplace / "outputs/by_sbatch/teacher/metrics.json").exists(), log)
        assert f"the same command continues from there; Slurm runs job {job} again" in log.read_text()
        words = ["-m", *TINY, "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "seed=0,-1"]
        if importlib.util.find_spec("submitit") is not None:
            done = subprocess.run([*program, *words, "name=by_submitit"], timeout=300, **options)
            assert done.returncode == 2 and "1 of 2 jobs failed" in done.stderr, done.stderr
            assert (workplace / "outputs/by_submitit-seed-0/teacher/metrics.json").exists()


def _until(condition, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "the job has not begun"
        time.sleep(0.2)
