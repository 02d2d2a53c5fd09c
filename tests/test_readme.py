"""What README.md, docs/ and the headers of conf/ tell the reader to type: run where it is quick, else composed."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from pdistill.commands import help as help_page
from pdistill.commands.arguments import with_folders
from pdistill.commands.cli import COMPOSED, PLAIN
from pdistill.commands.settings import settings_of
from pdistill.commands.steps_key import steps_is_a_key

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python ", "pdistill ", "make ", "pip ")
HERE = {  # for what the README names, what a test has
    "outputs/a outputs/b": "outputs/smoke",
    "outputs/demo": "outputs/smoke",
    "outputs/mine": "outputs/smoke",
    "num_images=64": "num_images=4",
    "(64, ": "(2, ",
    "randn(64, ": "randn(2, ",
    "num_steps=50": "num_steps=3",
    "baselines=all": "baselines=ddim metrics.num_samples=100 bootstrap=0 name=readme",
}
MODULES = {"pdistill.interop.flax": "test_official.py"}  # of `python -m`, with the test that runs them
LAUNCHED = re.compile(r"^(torchrun( --\S+)* |(exec|srun( --\S+)*|\w+=\S+) python )")  # what stands before a program
SHELL = ("", "bash")  # the languages of blocks of commands
OTHERS = (
    ". .venv/bin/activate",
    "pre-commit install",
    "pytest tests/",
    "hf auth login",
    "cp <",
    "python3 -m pip install",
)
DRAWINGS = {"architecture.md": 3}  # blocks that are neither commands nor code
RUN_ELSEWHERE = {"extending.md": "test_extending.py", "quickstart.md": "test_notebook.py"}
COMPILED = {
    "teachers.md": "test_text.py",
    "play.md": "test_play.py",
    "guidance.md": "test_guidance.py",
}  # with the test of what they show
OF_EXTENDING = ("--config-dir", "imports=")  # commands with parts of docs/extending.md, which test_extending.py runs


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of a page's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str) -> list[str]:
    """The lines that begin with a program, continued ones joined, comments left out, "there" for <what to fill in>."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    lines = (re.sub(r"<[^>]+>", "there", LAUNCHED.sub("python ", line)) for line in lines)
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith(PROGRAMS)]


def remarks(header: str) -> str:
    """The header of a configuration, without # and with every phrase on a line of its own."""
    lines = (line.removeprefix("#").strip() for line in header.splitlines() if line.startswith("#"))
    return re.sub(r"\s{2,}", "\n", "\n".join(lines))


README = [command for language, content in blocks(PAGES[0]) if language in SHELL for command in commands(content)]
IN_PAGES = [c for page in PAGES for language, content in blocks(page) if language in SHELL for c in commands(content)]
IN_CONF = [c for file in sorted((ROOT / "conf").rglob("*.yaml")) for c in commands(remarks(file.read_text()))]
ALL = list(dict.fromkeys([*IN_PAGES, *IN_CONF]))


def of_hydra(command: str) -> bool:
    """Whether Hydra composes it: `pdistill train ...`, `python train.py ...`."""
    return bool(re.match(rf"pdistill ({'|'.join(COMPOSED)})\b|python ({'|'.join(COMPOSED)})\.py\b", command))


def check(command: str, arguments: list[str]) -> None:
    """Composes a command line and makes its settings, which check themselves; of a multirun, every value once."""
    of_optuna = ("hydra/sweeper=optuna", "hydra.sweeper.")  # which is not among the packages of the tests
    overrides = [word for word in with_folders(arguments) if not word.startswith(("-", *of_optuna))]
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    swept = {o.key_or_group: _values(o) for o in parsed if o.is_sweep_override()}
    assert "-m" in arguments or not swept, f"several values of {', '.join(swept)}, without -m"
    if "-m" in arguments:
        of_experiment = composed(command, fixed).hydra.sweeper.params or {}
        swept |= {key: str(values).split(",") for key, values in of_experiment.items()}
    for k in range(max(map(len, swept.values()), default=1)):
        cfg = composed(command, [*fixed, *(f"{key}={values[k % len(values)]}" for key, values in swept.items())])
        HydraConfig.instance().set_config(cfg)  # `name` is made of it
        with open_dict(cfg):
            del cfg["hydra"]
        settings_of(cfg)


def _values(override: Override) -> list[str]:
    """What a sweep tries: of an interval, its ends."""
    if override.is_interval_sweep():
        interval: Any = override.value()
        return [str(interval.start), str(interval.end)]
    return list(override.sweep_string_iterator())


def composed(command: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(command, overrides, return_hydra_config=True)


@pytest.fixture(autouse=True)
def no_hydra_config_stays():
    yield
    HydraConfig.instance().cfg = None


def test_the_patterns_find_commands():
    assert len(README) > 15 and len(IN_PAGES) > 30 and len(IN_CONF) > 15
    assert {command.partition(" ")[0] for command in README} == {"make", "python", "pdistill"}
    for wrong in ("weighing=snr", "weighting=sno", "training.update=3", "training.updates=x", "weighting=snr,constant"):
        with pytest.raises((HydraException, OmegaConfBaseException, AssertionError)):
            check("train", [wrong])


@pytest.mark.parametrize("command", filter(of_hydra, ALL))
def test_hydra_composes(command):
    program, script, *arguments = shlex.split(command)
    name = script.removesuffix(".py")
    if "--help" in arguments:
        assert "Keys (key=value):" in help_page.of_command(name, subcommand=program == "pdistill")
    elif not any(word in command for word in OF_EXTENDING):
        if name != "evaluate":
            check(name, arguments)
        else:
            with steps_is_a_key():
                check(name, arguments)


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_composes(experiment):
    for command in ("train", "distill"):
        check(command, ["-m", f"experiment={experiment}"])


@pytest.mark.parametrize("command", [command for command in ALL if not of_hydra(command)])
def test_other_commands_name_what_exists(command):
    program, *words = shlex.split(command)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", makefile, re.M) for word in words if "=" not in word)
    elif program == "pdistill":
        assert words[0] in (*PLAIN, "--help", "--version")
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1]) and (ROOT / "tests" / MODULES[words[1]]).exists()
    elif program == "python":
        assert (ROOT / words[0]).exists()


def here(text: str) -> str:
    """A text of the README with what a test has for what it names."""
    for theirs, ours in HERE.items():
        text = text.replace(theirs, ours)
    return text


def pdistill(workplace: Path, *words: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PDISTILL_CACHE": str(workplace / "cache"), "PYTHONPATH": paths}
    return Command("pdistill.commands.cli", *words, cwd=workplace, env=environment).finished(timeout=120)


# Without a server of W&B's, and without one that never ends, which test_play.py drives.
QUICK = [command for command in README if re.match(rf"pdistill (sample|{'|'.join(PLAIN)})\b", command)]
QUICK = [command for command in QUICK if "wandb:" not in command and not command.startswith("pdistill play")]
QUICK += [next(command for command in README if command.startswith("python evaluate.py"))]


@pytest.mark.parametrize("command", [*QUICK, "pdistill --version", "pdistill --help"])
def test_quick_commands_of_the_readme_run(command, smoke, workplace):
    words = [word.removesuffix(".py") for word in shlex.split(here(command))[1:]]
    done = pdistill(workplace, *words)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_readmes_python_runs(smoke, workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    write_pipeline(tmp_path / "pipeline")
    found = [content for language, content in blocks(PAGES[0]) if language == "python"]
    assert len(found) == 3
    shutil.copytree(smoke / "steps-0004" / "denoiser", tmp_path / "mine-4-steps")
    for content in found:
        names: dict[str, Any] = {}
        exec(
            compile(
                here(content)
                .replace("my_pipeline", str(tmp_path / "pipeline"))
                .replace("mine-4-steps", str(tmp_path / "mine-4-steps")),
                "README.md",
                "exec",
            ),
            names,
        )
        assert len(names["images"]) in (2, 4)
    assert names["images"].isfinite().all() and names["student"].num_steps == 4


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_every_block_of_the_pages_is_looked_at(page, smoke, tiny, tmp_path, monkeypatch):
    """Commands are composed, or known by their beginning; Python runs on what a test has, or is compiled at least."""
    drawings, unknown = 0, []
    for language, content in blocks(page):
        if language in SHELL:
            lines = [line.strip() for line in content.replace("\\\n", " ").splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith("#") and not line.startswith(OTHERS)]
            drawings += not commands(content) and bool(lines)
            unknown += [line for line in lines if not commands(line)] if commands(content) else []
        elif language == "python":
            code = compile(content, page.name, "exec")
            if page.name not in COMPILED | RUN_ELSEWHERE:
                _run(code, smoke, tiny, tmp_path, monkeypatch)
        else:
            assert page.name in RUN_ELSEWHERE and language == "yaml", f"a block of {language}: who runs it?"
    assert not unknown and drawings == DRAWINGS.get(page.name, 0)
    assert all((ROOT / "tests" / test).exists() for test in (COMPILED | RUN_ELSEWHERE).values())


def _run(code: Any, smoke: Path, tiny: Any, place: Path, monkeypatch: Any) -> None:
    """Python of a page, where its folders are students of 4 steps; of classes where the code speaks of them."""
    monkeypatch.chdir(place)
    if any("class_labels" in str(constant) for constant in code.co_consts):
        student = tiny("v", num_classes=10)
        student.num_steps = 4
        student.save(place / "student")
    else:
        for name in ("student", "mine-4-steps"):
            shutil.copytree(smoke / "steps-0004" / "denoiser", place / name, dirs_exist_ok=True)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["images"]) == 4


def write_pipeline(folder: Path) -> None:
    """What a user of diffusers has: a DDPMPipeline of a small UNet2DModel, untrained."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    down, up = ("DownBlock2D",), ("UpBlock2D",)
    network = UNet2DModel(8, 3, 3, down_block_types=down, up_block_types=up, block_out_channels=(32,))
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_what_pages_name_exists(page):
    """Relative links, files in backticks, and extras of pip."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [page.parent / link for link in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text)]
    missing = [str(link) for link in links if not link.exists()]
    for name in re.findall(r"`((?:conf|tests|benchmarks|src|commands|training|metrics|hydra_plugins)/[\w./-]*)`", text):
        places = (ROOT / name, ROOT / "src" / name, ROOT / "src" / "pdistill" / name)
        missing += [] if any(place.exists() for place in places) else [name]
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"'pdistill\[(.+?)\]'", text)
    missing += [extra for extra in extras if not re.search(rf"^{extra} = \[", project, re.M)]
    assert not missing
