"""push: the folder and its card as the hub's client and diffusers read them, what is uploaded, what is refused."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from finished_runs import UNMEASURED, evaluated, make_run, write_evaluation
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from pdistill.commands import push
from pdistill.commands.evaluate import evaluate
from pdistill.commands.settings import Evaluate
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.metrics.classifier import train_classifier
from pdistill.metrics.settings import Metrics
from pdistill.network import with_guidance
from pdistill.parameterization import V
from pdistill.schedule import CosineSchedule

ID = "me/digits-1-step"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "a token")
    return tmp_path


@pytest.fixture
def run_of_tiny(tiny):
    """run_of_tiny(lineage, changed, provenance) -> outputs/run, a teacher and two students with random weights."""

    def run_of_tiny(lineage: tuple = ("teacher",), changed: dict | None = None, **options: Any) -> Path:
        run = make_run("run", {"teacher": 5.0, "steps-0002": 7.0, "steps-0001": 9.0}, changed, **options)
        for seed, (stage, num_steps) in enumerate((("teacher", None), ("steps-0002", 2), ("steps-0001", 1))):
            denoiser = tiny(seed=seed)
            denoiser.num_steps, denoiser.lineage = (
                num_steps,
                [*lineage, *range(2, num_steps - 1 if num_steps else 2, -1)],
            )
            denoiser.save(run / stage / "denoiser")
        return run

    return run_of_tiny


def code_of(folder: Path) -> str:
    """The Python of the card, with the folder for the hub's name."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return code.replace(ID, str(folder))


def test_a_finished_run_as_the_hub_and_diffusers_read_it(smoke, here, workplace, monkeypatch, capsys):
    run = Path("outputs/smoke")
    shutil.copytree(smoke, run)
    monkeypatch.setenv("PDISTILL_CACHE", str(workplace / "cache"))
    metrics = Metrics(partial(train_classifier, max_updates=20), 40)
    rows = json.loads(evaluate(Evaluate(str(run), device="cpu", bootstrap=2, metrics=metrics)).read_text())
    push.main(["outputs/smoke", ID, "--local", "folder", "--license", "apache-2.0"])
    folder = here / "folder"
    files = {str(path.relative_to(run / "steps-0001/denoiser")) for path in (run / "steps-0001/denoiser").rglob("*.*")}
    written = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert written == files | {"README.md", "comparison.png", "samples.png"}

    card = ModelCard.load(folder / "README.md")
    assert card.data["license"] == "apache-2.0" and card.data["library_name"] == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert not {"base_model", "datasets"} & card.data.to_dict().keys()
    found = {(r.metric_type, r.metric_args["num_samples"]): r for r in card.data.eval_results}
    own = json.loads((run / "steps-0001/metrics.json").read_text())
    (by_evaluate,) = [row for row in rows if row["provenance"]["num_steps"] == 1]
    expected = {("fid_classifier", 200): own["fid_classifier"]} | {
        (name, 40): by_evaluate[name]
        for name in ("fid_classifier", "kid_classifier", "is_classifier", "precision", "recall")
    }
    assert {key: r.metric_value for key, r in found.items()} == expected
    measured = found["precision", 40]
    assert measured.dataset_name == "digits" and measured.metric_args["std"] == by_evaluate["precision_std"]
    about = {k: v for k, v in by_evaluate["provenance"].items() if k not in ("denoiser", "label", "num_steps")}
    assert about | {"nfe": 1} == {k: v for k, v in measured.metric_args.items() if k != "std"}
    assert "pdistill distill experiment=smoke" in card.text and str(here) not in card.content

    made: dict[str, Any] = {}
    exec(code_of(folder), made)
    assert made["image"].size == (8, 8)

    push.main(["outputs/smoke", ID, "--stage", "steps-0002", "--local", "folder"])  # its own folder is replaced
    assert "no --license" in capsys.readouterr().err
    again = ModelCard.load(folder / "README.md")
    assert again.data.license is None and "num_inference_steps=2" in code_of(folder)
    assert {r.metric_args["nfe"] for r in again.data.eval_results} == {2}


def test_metrics_of_other_weights_do_not_enter(run_of_tiny, tiny, capsys):
    measured = {"denoiser_fingerprint": tiny(seed=2).fingerprint}  # the last student's, in every row
    run = run_of_tiny(provenance=measured)
    others = {"denoiser_fingerprint": tiny(seed=1).fingerprint}
    write_evaluation(run, [evaluated(run, "distilled", 1, 6.5, **others), evaluated(run, "distilled", 1, 8.25)])
    push.main(["outputs/run", ID, "--dry-run"])
    card = ModelCard(capsys.readouterr().out)
    assert [r.metric_value for r in card.data.eval_results] == [9.0]
    assert "9.00" in card.text and "7.00" not in card.text and "5.00" not in card.text
    write_evaluation(run, [])
    push.main(["outputs/run", ID, "--stage", "steps-0002", "--dry-run"])
    told = capsys.readouterr()
    assert "model-index" not in told.out and "No metric of these weights is known." in told.out
    assert "pdistill evaluate denoiser=outputs/run/steps-0002/denoiser" in told.err
    assert not list(Path().rglob("README.md"))


def test_what_came_from_the_hub_is_named(run_of_tiny, here, capsys):
    data = {"_target_": "pdistill.dataset.huggingface.load", "path": "someone/cats", "split": "train", "subset": None}
    changed = {"teacher": "someone/ddpm-cats", "dataset": data}
    made = {"version": "0.2.0", "data": "d1", "overrides": ["dataset=huggingface", "dataset.path=/home/me/own photos"]}
    provenance = {"reference": "huggingface:cats"}
    run = run_of_tiny(("diffusers:ddpm-cats",), changed, made=made, provenance=provenance)
    metrics = run / "steps-0001" / "metrics.json"
    row = json.loads(metrics.read_text())
    row["provenance"]["denoiser_fingerprint"] = Denoiser.load(run / "steps-0001" / "denoiser").fingerprint
    metrics.write_text(json.dumps(row))
    push.main(["outputs/run", ID, "--dry-run"])
    card = ModelCard(capsys.readouterr().out)
    assert card.data.base_model == "someone/ddpm-cats" and card.data["base_model_relation"] == "finetune"
    assert card.data.datasets == ["someone/cats"]
    assert (card.data.eval_results[0].dataset_type, card.data.eval_results[0].dataset_split) == (
        "someone/cats",
        "train",
    )
    assert "diffusers:ddpm-cats" in card.text and "pdistill distill dataset=huggingface" in card.text
    assert "own photos" in card.text and "/home/me" not in card.text

    for name in ("ddpm-cats", "cats"):  # folders on this machine
        (here / "someone" / name).mkdir(parents=True)
    push.main(["outputs/run", ID, "--dry-run"])
    assert not {"base_model", "datasets"} & ModelCard(capsys.readouterr().out).data.to_dict().keys()


def test_the_cards_lines_run_without_a_pipeline_and_with_one_in_the_folder(run_of_tiny, here, monkeypatch):
    directory = run_of_tiny() / "steps-0002" / "denoiser"
    index = directory / "model_index.json"
    own = json.loads(index.read_text()) | {"_class_name": ["pipeline", "Own"]}
    index.unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", str)
    push.main([str(directory), ID, "--local", "plain"])
    assert ModelCard.load(here / "plain" / "README.md").data["library_name"] == "pdistill"
    names: dict[str, Any] = {}
    exec(code_of(here / "plain"), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["denoiser"].num_steps == 2

    index.write_text(json.dumps(own))
    (directory / "pipeline.py").write_text(
        "from diffusers import DDPMPipeline\n\n\nclass Own(DDPMPipeline):\n    pass\n"
    )
    push.main([str(directory), ID, "--local", "own"])
    assert "trust_remote_code=True" in code_of(here / "own")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(here / "modules"))
    exec(code_of(here / "own"), names)
    assert type(names["pipeline"]).__name__ == "Own" and names["image"].size == (8, 8)


def test_the_card_of_a_guided_student_says_how_to_guide_it(tiny, here, monkeypatch):
    base = tiny(num_classes=4).network
    for name, network, taught in (("ranged", with_guidance(base), (1.0, 5.0)), ("one", base, (3.0, 3.0))):
        options = {"num_steps": 2, "lineage": ["teacher", "guided", 2], "null_label": 3, "guidance": taught}
        Denoiser(network, V(), CosineSchedule(), **options).save(name)
        push.main([name, ID, "--local", f"{name}-pushed"])
    ranged, one = ((here / f"{name}-pushed" / "README.md").read_text() for name in ("ranged", "one"))
    assert "class_labels=[0], guidance=2.0" in ranged and "`guidance` may be from 1 to 5" in ranged
    assert "run `pipeline.py` and `unet/guided.py` of this folder" in ranged and "Read both files" in ranged
    assert "Guidance 3 is in the weights" in one and "guidance=" not in one and "guided.py" not in one
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(here / "modules"))
    names: dict[str, Any] = {}
    exec(code_of(here / "ranged-pushed"), names)
    assert names["image"].size == (8, 8)
    with pytest.raises(ValueError, match="guidance=6"):
        names["pipeline"](class_labels=[0], guidance=6)


def test_metrics_at_several_values_of_guidance_stand_apart(run_of_tiny, tiny, capsys):
    run = run_of_tiny()
    weights = {"denoiser_fingerprint": tiny(seed=2).fingerprint}
    rows = [evaluated(run, "a", 1, 6.5, **weights, guidance=1.0)]
    rows += [evaluated(run, "b", 1, 7.5, **weights, guidance=3.0, network_evaluations=2)]
    write_evaluation(run, rows)
    push.main(["outputs/run", ID, "--dry-run"])
    card = ModelCard(capsys.readouterr().out)
    fids = [r for r in card.data.eval_results if r.metric_type == "fid_classifier"]
    assert [(r.metric_value, r.metric_args["guidance"], r.metric_args["nfe"]) for r in fids] == [
        (6.5, 1, 1),
        (7.5, 3, 2),
    ]
    assert "| guidance | sampler |" in card.text and "1 step, guidance 3, 200 samples" in fids[1].metric_name


class Hub:
    """Stands for HfApi: keeps what it is asked, with what the folder held, and says what a test wants it to."""

    def __init__(self, files: tuple = (".gitattributes",), private: bool = False, error: Exception | None = None):
        self.files, self.private, self.error = files, private, error
        self.calls: dict[str, dict] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        validate_repo_id(repo_id)
        self.calls["create_repo"] = {"repo_id": repo_id} | options
        if self.error is not None:
            raise self.error
        return f"https://huggingface.co/{repo_id}"

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls["create_branch"] = {"repo_id": repo_id} | options

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, repo_id: str, revision: str | None = None) -> list[str]:
        return list(self.files)

    def upload_folder(self, *, folder_path: Path, **options: Any) -> None:
        held = sorted(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file())
        self.calls["upload_folder"] = options | {"held": held}


def test_what_is_uploaded(run_of_tiny, monkeypatch, capsys):
    run_of_tiny()
    hub = Hub(private=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    push.main(["outputs/run", ID, "--private", "--revision", "two", "--message", "Two steps", "--license", "mit"])
    assert hub.calls["create_repo"] == {"repo_id": ID, "private": True, "exist_ok": True}
    assert hub.calls["create_branch"] == {"repo_id": ID, "branch": "two", "exist_ok": True}
    uploaded = hub.calls["upload_folder"]
    assert (uploaded["repo_id"], uploaded["revision"], uploaded["commit_message"]) == (ID, "two", "Two steps")
    unet = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    there = ["README.md", "denoiser.json", "model_index.json", "samples.png", "scheduler/scheduler_config.json", *unet]
    assert uploaded["held"] == there and "unet/*" in uploaded["delete_patterns"]
    assert f"pushed to https://huggingface.co/{ID}" in capsys.readouterr().out

    for hub, options, message in (
        (Hub(private=False), ["--private"], "is there and public"),
        (Hub(("model.bin",)), [], "holds files that push did not write"),
    ):
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda hub=hub: hub)
        with pytest.raises(UserError, match=message):
            push.main(["outputs/run", ID, *options])
        assert "upload_folder" not in hub.calls


def refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error\nmore", response=response)


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (refusal(401), "hf auth login"),
        (refusal(403), f"may not write to {ID}"),
        (refusal(409), "does not take"),
        (ConnectionError("Name or service not known"), "go online, or write the folder here with --local"),
        (ValueError("Invalid metadata in README.md.\n- license"), "Invalid metadata"),
    ],
    ids=["no-token", "not-allowed", "conflict", "offline", "metadata"],
)
def test_what_the_hub_refuses_is_one_line(error, cure, run_of_tiny, monkeypatch):
    run_of_tiny()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(error=error))
    with pytest.raises(UserError, match=cure) as told:
        push.main(["outputs/run", ID])
    assert "\n" not in str(told.value)


def test_offline_the_command_ends_in_one_line(run_of_tiny, monkeypatch):
    """With the hub's own client, which reads its environment when it is imported."""
    run_of_tiny()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "pdistill.commands.cli", "push", "outputs/run", ID, "--license=mit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "go online, or write the folder here with --local FOLDER" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing", ID], "nothing is no directory"),
        (["outputs", ID], "no config.yaml"),
        (["outputs/bare", ID], "no finished student yet.*--stage=teacher"),
        (
            ["outputs/run", ID, "--stage", "steps-0009"],
            "no finished stage steps-0009: choose among teacher, steps-0002",
        ),
        (["outputs/run/steps-0002/denoiser", ID, "--stage", "teacher"], "leave out --stage=teacher"),
        (["outputs/run", "a/b/c"], "cannot be a name on the hub"),
        (["outputs/run", "me/x..y"], "cannot be a name on the hub"),
        (["outputs/run", "digits"], "names no owner: give <owner>/<name>"),
        (["outputs/run", ID, "--license", "Apache License"], "--license=Apache License is no identifier"),
        (["outputs/run", ID, "--local", "outputs"], "lies in or around"),
        (["outputs/run", ID, "--local", "full"], r"holds files that push did not write \(notes.txt\)"),
        (["outputs/run", ID, "--local", "readme"], "holds files that push did not write"),
        (["outputs/run", ID, "--local", "full/notes.txt"], "is a file"),
        (["outputs/run", ID, "--local", "new", "--private"], "--private is of an upload"),
        (["outputs/run"], "repo_id: see `pdistill push --help`"),
    ],
)
def test_bad_input_is_one_line(words, message, run_of_tiny, here):
    run_of_tiny()
    make_run("bare", {"teacher": UNMEASURED})
    for file in ("full/notes.txt", "readme/README.md"):
        (here / file).parent.mkdir()
        (here / file).write_text("mine")
    with pytest.raises(UserError, match=message) as told:
        push.main(words)
    assert "\n" not in str(told.value) and not Path("new").exists()
    assert Path("full/notes.txt").read_text() == Path("readme/README.md").read_text() == "mine"


def test_without_a_token_nothing_is_tried(run_of_tiny, here, monkeypatch):
    run_of_tiny()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="run `hf auth login`, or write the folder here with --local FOLDER"):
        push.main(["outputs/run", ID])


def test_a_folder_is_whole_or_not_there(run_of_tiny, here, monkeypatch):
    run_of_tiny()
    push.main(["outputs/run", ID, "--local", "folder"])
    before = (here / "folder" / "README.md").read_text()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(push, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        push.main(["outputs/run", ID, "--stage", "steps-0002", "--local", "folder"])
    assert (here / "folder" / "README.md").read_text() == before
    assert sorted(path.name for path in here.iterdir()) == ["folder", "outputs"]
    assert Denoiser.load(here / "folder").num_steps == 1
