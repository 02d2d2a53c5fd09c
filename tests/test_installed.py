"""The wheel: what is in it, what it says it needs, and that the command it brings works far from the repository."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import pdistill

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULE_OF = {  # a distribution's module, where the names differ
    "hydra-core": "hydra",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "nvidia-ml-py": "pynvml",
    **dict.fromkeys(["hydra-submitit-launcher", "hydra-joblib-launcher", "hydra-optuna-sweeper"], "hydra_plugins"),
    "pyyaml": "yaml",
}
BY_OTHERS = {"tensorboard", "onnx", "onnxscript"}  # of Lightning's TensorBoardLogger, and of torch.onnx
BY_OTHERS |= {"mkdocs_material", "mkdocstrings"}  # of mkdocs.yml


def _modules_of(requirements: list[str]) -> set[str]:
    names = [re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower() for requirement in requirements]
    return {MODULE_OF.get(name, name.replace("-", "_")) for name in names if name != PROJECT["name"]}


def _imported() -> dict[str, str]:
    """Every module that src, the scripts and conf/ import, with a place that does."""
    found = {}
    for path in [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.partition(".")[0]: f"{path.name}:{node.lineno}" for name in names}
    for path in (ROOT / "conf").rglob("*.yaml"):
        node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        found |= {target.partition(".")[0]: path.name for target in _targets(node)}
    return {name: place for name, place in found.items() if name not in {*sys.stdlib_module_names, "pdistill"}}


def _targets(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (str(value) for key, value in node.items() if key == "_target_")
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(child)


def test_dependencies_are_declared_and_used():
    optional = [r for name, extra in PROJECT["optional-dependencies"].items() if name != "dev" for r in extra]
    declared, imported = _modules_of([*PROJECT["dependencies"], *optional]), _imported()
    undeclared = [f"{place} imports {name}" for name, place in imported.items() if name not in declared]
    unused = [f"{name} is declared, and nothing imports it" for name in declared - {*imported, *BY_OTHERS}]
    assert not undeclared + unused, "\n".join(undeclared + unused)


def test_constraints_pin_what_is_declared():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in _lines(ROOT / "constraints.txt")}
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=!~; ]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}
    assert names - {PROJECT["name"]} <= pinned


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built apart from the checkout: setuptools leaves a build/ behind, and would take up an older one."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("src", "conf", "pyproject.toml", "README.md", "LICENSE"):
        _copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source))
    (built,) = wheels.glob("*.whl")
    return built


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            if child.name != "__pycache__" and not child.name.endswith(".egg-info"):
                _copy(child, to / child.name)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_wheel_holds_code_configuration_and_types(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if not name.partition("/")[0].endswith(".dist-info")}
        (entry_points,) = [name for name in content.namelist() if name.endswith("entry_points.txt")]
        assert "pdistill = pdistill.commands.cli:main" in content.read(entry_points).decode()
    package = {p for p in (ROOT / "src" / "pdistill").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    files = {f"pdistill/{path.relative_to(ROOT / 'src' / 'pdistill')}" for path in package}
    files |= {str(Path("pdistill") / path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {"pdistill/py.typed", "pdistill/conf/train.yaml"} <= files
    assert names == files


def _environment(directory: Path) -> tuple[Path, dict[str, str]]:
    """An environment's bin/ and the variables to run its programs with: none that would lead back to the checkout."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return directory / "bin", variables | {"PDISTILL_CACHE": str(directory / "cache"), "WANDB_MODE": "offline"}


def _check_command(directory: Path, work: Path) -> None:
    """The command of the environment in `directory`, run in the empty directory `work`."""
    programs, variables = _environment(directory)

    def run(*command: str) -> str:
        command = (str(programs / command[0]), *command[1:])
        done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        return done.stdout

    home = Path(run("python", "-c", "import pdistill; print(pdistill.__file__)").strip())
    assert home.is_relative_to(directory)
    version = run("python", "-c", "from importlib.metadata import version; print(version('pdistill'))").strip()
    assert run("pdistill", "--version").split() == ["pdistill", version]
    usage = run("pdistill", "--help")
    assert all(command in usage for command in ("train", "distill", "evaluate", "sample", "report", "sweep"))
    run("pdistill", "distill", "experiment=smoke")
    for name in ("teacher/denoiser", "steps-0001/denoiser", "summary.json", "report.html"):
        assert (work / "outputs" / "smoke" / name).exists(), name


def test_the_command_far_from_the_repository(wheel, tmp_path):
    """In an environment that sees the project's packages, but not its checkout."""
    directory, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    venv.create(directory, with_pip=False, symlinks=True)
    _pip("--python", str(directory / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = directory.glob("lib/python*/site-packages")
    # A path file read from a path file's directory is not followed: the checkout's editable install stays unseen.
    (packages / "packages_of_the_project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _check_command(directory, work)


@pytest.mark.slow
def test_the_command_in_an_empty_environment(wheel, tmp_path):
    """With nothing but what the wheel says it needs; pip downloads it."""
    directory, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    venv.create(directory, with_pip=False, symlinks=True)
    python, constraints = str(directory / "bin" / "python"), str(ROOT / "constraints.txt")
    _pip("--python", python, "install", "-c", constraints, str(wheel))
    _check_command(directory, work)


def test_the_citation_names_this_version():
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation.version == pdistill.__version__
