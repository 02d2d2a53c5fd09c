"""The rules of the layout (docs/architecture.md): where things lie, who imports whom, what stays small.

Every failure lists the offenders, one in a line.
"""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "pdistill"
MATHS = ("schedule", "parameterization", "weighting", "sampling", "target")
LAYERS = (  # from the bottom; a package imports none of its own layer, flat modules may
    # Settings are plain dataclasses, which whoever is configured by them may name.
    (
        "errors",
        "lazy",
        "faults",
        "files",
        "reading",
        "processes",
        "randomness",
        "registry",
        "bars",
        "display",
        "checks",
        "training.settings",
        "metrics.settings",
    ),
    MATHS,
    ("unets", "guided", "network", "claims", "denoiser", "heads", "lora", "generation"),
    ("interop",),
    ("storage",),
    ("steps", "optimizer", "dataset"),
    ("method", "metrics"),
    ("training", "report"),
    ("play",),
    ("commands",),
)
UPWARDS = {("denoiser", "storage"), ("denoiser", "heads")}  # imported inside the methods of Denoiser
NO_MODULE = {"trainer", "experiment", "hydra"}  # groups of Lightning's and Hydra's own, and of whole experiments
IN_TRAINING = {"logger", "callbacks"}
MOST_ARGUMENTS = 6
KEYWORDS_FREE = {  # public functions
    "sampling.sample",
    "target.distillation_target",
    "denoiser.Denoiser.__init__",
    "interop.pipeline.StudentPipeline.__init__",
    "interop.pipeline.StudentPipeline.__call__",
}
# Of nodes of conf/, which give their arguments by name:
NODES = {
    "network.unet",
    "dataset.folders.image_folder",
    "dataset.huggingface.load",
    "metrics.classifier.train_classifier",
}
PUBLIC = {
    "conversions": ("Eps", "X", "XEps", "V", "CosineSchedule"),
    "weightings": ("snr", "truncated_snr", "snr_plus_one", "constant"),
    "functions": ("sample", "ddim_step", "distillation_target", "register"),
    "denoisers": ("Denoiser", "load_official_checkpoint", "load_diffusers_teacher"),
}


@dataclass(frozen=True)
class Module:
    """A source file; `name` is relative to pdistill, e.g. "training.module", or "training" for its __init__.py."""

    path: Path
    name: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]

    def imports(self) -> Iterator[tuple[str, int]]:
        """Every (dotted name, line): "torch.nn", or "pdistill.files.whole" for `from pdistill.files import whole`."""
        package = ["pdistill", *self.name.split(".")][: None if self.path.name == "__init__.py" else -1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                names = [*base, *([node.module] if node.module else [])]
                yield from ((".".join([*names, alias.name]), node.lineno) for alias in node.names)


def _modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the package itself names everything, lazily
            found.append(Module(path, name))
    return found


MODULES = _modules()
NAMES = {module.name for module in MODULES}


def _inner_imports(module: Module) -> Iterator[tuple[str, str, int]]:
    """(module of the project, name taken from it or "", line) of every import from the project."""
    for name, line in module.imports():
        root, _, inner = name.partition(".")
        if root != "pdistill":
            continue
        target, _, taken = inner.rpartition(".")
        yield (inner, "", line) if inner in NAMES else (target, taken, line)


def _layer(name: str) -> int | None:
    """The layer of a module: that of its longest prefix which LAYERS names."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return number
    return None


def _none(offenders: list[str]) -> None:
    if offenders:
        pytest.fail("\n".join(sorted(offenders)), pytrace=False)


def test_a_hydra_group_has_a_module_of_its_name():
    groups = {directory.name for directory in (ROOT / "conf").iterdir() if directory.is_dir()} - NO_MODULE
    _none([f"conf/{group}/ has no src/pdistill/{group}" for group in groups - IN_TRAINING if group not in NAMES])
    inside = {f"training.{group}" for group in groups & IN_TRAINING}
    _none([f"conf/: no module {name}" for name in inside - NAMES])


def test_a_script_at_the_top_has_a_command_of_its_name():
    scripts = [path.stem for path in ROOT.glob("*.py")]
    _none([f"{script}.py has no commands/{script}.py" for script in scripts if f"commands.{script}" not in NAMES])


def test_the_maths_imports_torch_alone():
    allowed = {f"pdistill.{name}" for name in (*LAYERS[0], *MATHS)}
    offenders = []
    for module in MODULES:
        for name, line in module.imports() if module.name in MATHS else ():
            top = name.partition(".")[0]
            inner = name in allowed or name.rpartition(".")[0] in allowed
            if not (inner or top == "torch" or top in sys.stdlib_module_names):
                offenders.append(f"{module.name}:{line} imports {name}")
    _none(offenders)


def test_imports_point_downwards():
    offenders = [f"{module.name} is in no layer" for module in MODULES if _layer(module.name) is None]
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        for target, taken, line in _inner_imports(module):
            here, there = _layer(module.name), _layer(target)
            if target == "" and taken != "__version__":
                offenders.append(f"{module.name}:{line} imports {taken} from the package, not from its module")
            if here is None or there is None or (module.name, target) in UPWARDS:
                continue
            graph.setdefault(module.name, set()).add(target)
            if there > here:
                offenders.append(f"{module.name}:{line} imports {target}, which is above it")
            room = target.partition(".")[0]
            if there == here and room != module.room and "." in module.name and (PACKAGE / room).is_dir():
                offenders.append(f"{module.name}:{line} imports {target}, a package beside its own")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        offenders.append("a circle: " + " -> ".join(reversed(error.args[1])))
    _none(offenders)


def test_private_names_stay_at_home():
    offenders = []
    for module in MODULES:
        aliases = {}
        for target, taken, line in _inner_imports(module):
            at_home = target.partition(".")[0] == module.room
            if not taken and not at_home:
                aliases[target.rpartition(".")[2]] = target
            if _is_private(taken) and not at_home:
                offenders.append(f"{module.name}:{line} imports {target}.{taken}")
        for node in ast.walk(module.tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            if node.value.id in aliases and _is_private(node.attr):
                offenders.append(f"{module.name}:{node.lineno} uses {node.value.id}.{node.attr}")
    _none(offenders)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_function_takes_more_than_six_arguments():
    offenders, seen = [], set()
    for module in MODULES:
        for name, function in _functions(module.tree, module.name):
            seen.add(name)
            arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            if name not in KEYWORDS_FREE:
                arguments += [a.arg for a in function.args.kwonlyargs]
            count = len([a for a in arguments if a not in ("self", "cls")])
            if count > MOST_ARGUMENTS and name not in NODES:
                offenders.append(f"{name}, line {function.lineno}: {count} arguments")
    offenders += [f"{name} is excused and does not exist" for name in (KEYWORDS_FREE | NODES) - seen]
    _none(offenders)


def _functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function below `node` with its dotted name, those of classes and of functions included."""
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner, child
        yield from _functions(child, inner)


def test_every_bar_is_made_in_bars():
    found = [(module, name, line) for module in MODULES if module.name != "bars" for name, line in module.imports()]
    _none([f"{module.name}:{line} imports {name}" for module, name, line in found if name.startswith("tqdm")])


def test_configuration_stops_in_commands():
    offenders = []
    for module in MODULES:
        if module.room == "commands":
            continue
        for name, line in module.imports():
            if name.partition(".")[0] in ("hydra", "omegaconf"):
                offenders.append(f"{module.name}:{line} imports {name}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.arg) and node.arg == "cfg":
                offenders.append(f"{module.name}:{node.lineno} takes cfg")
    _none(offenders)


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("pdistill", "torch numpy diffusers lightning hydra torchmetrics matplotlib"),
        ("pdistill.training.settings pdistill.metrics.settings", "torch diffusers lightning torchmetrics matplotlib"),
        ("pdistill.denoiser pdistill.storage pdistill.training.fit pdistill.method", "peft datasets gradio onnx"),
        ("pdistill.dataset", "diffusers lightning hydra torchmetrics torchvision matplotlib"),
        (" ".join(f"pdistill.{name}" for name in MATHS), "diffusers lightning hydra torchmetrics matplotlib"),
    ],
)
def test_what_an_import_brings(modules, unwanted):
    brought = _printed(f"import {', '.join(modules.split())}\n{_FOUND.format(unwanted.split())}")
    _none([f"import {modules} brings {name}" for name in brought.split()])


def test_what_a_training_imports():
    brought = _printed(f"{_QUICK}\n{_FOUND.format(['transformers', 'scipy.signal', 'peft'])}")
    _none([f"a training imports {name}" for name in brought.split()])


def test_packages_imported_lazily_are_whole_for_who_asks():
    asked = """
import gc
import diffusers, lightning, torchmetrics
from diffusers.models.unets import UNet1DModel
from diffusers.quantizers import PipelineQuantizationConfig
from torchmetrics import Accuracy, Metric
from torchmetrics.image import StructuralSimilarityIndexMeasure
from pdistill.unets import UNet2DModel
same = lightning.pytorch.core.module.Metric is torchmetrics.metric.Metric is Metric
print(gc.isenabled(), same, issubclass(Accuracy, Metric), issubclass(StructuralSimilarityIndexMeasure, Metric))
print(diffusers.UNet2DModel is UNet2DModel, torchmetrics.functional.accuracy.__name__, torchmetrics.__version__ > "1")
"""
    assert _printed(_QUICK + asked) == "True True True True\nTrue accuracy True\n"


_FOUND = "import sys; print(*sorted(set({}) & set(sys.modules)))"
_QUICK = "from pdistill.lazy import quick_imports\nwith quick_imports(): import pdistill.commands.stages"


def _printed(code: str) -> str:
    """By a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_public_names():
    package = importlib.import_module("pdistill")
    names = [name for kind in PUBLIC.values() for name in kind]
    _none([f"pdistill.{name} is missing" for name in names if getattr(package, name, None) is None])
    _none([f"{name} is not in pdistill.__all__" for name in names if name not in package.__all__])


def test_layers_name_nothing_twice():
    names = sorted(name for layer in LAYERS for name in layer)
    _none([f"{a} is in two layers" for a, b in pairwise(names) if a == b])
    _none([f"{name} does not exist" for name in names if name not in NAMES])
