"""`pdistill --help`, and each command's: its groups with their choices, its keys with type, default and meaning."""

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pdistill import __version__
from pdistill.training.settings import Execution

COMMANDS = {
    "train": "train a teacher",
    "distill": "distil a teacher stage by stage; trains it first, unless teacher=<denoiser> is given",
    "evaluate": "FID, KID, Inception score, precision and recall of a run or a denoiser",
    "sample": "pictures from a denoiser",
    "export": "a denoiser's whole sampler as one file: pdistill export <denoiser> --format onnx|pt2",
    "estimate": "passes, FLOPs, memory and hours of a run of distill, before it is begun",
    "status": "the runs here: their stage, metric, and whether somebody is writing them",
    "report": "one page on finished runs: pdistill report outputs/a outputs/b",
    "sweep": "one table over runs: pdistill sweep outputs/a outputs/b, or wandb:<entity>/<project>",
    "play": "a local page, teacher and students side by side: pdistill play outputs/a",
    "push": "a denoiser with its model card, to the Hugging Face hub: pdistill push outputs/a me/name",
}


def overview() -> str:
    """What `pdistill --help` prints."""
    lines = [f"  {command:<10}{about}" for command, about in COMMANDS.items()]
    return (
        f"pdistill {__version__}: progressive distillation of diffusion models\n\n"
        "usage: pdistill <command> [group=choice] [key=value] [-m]\n\n" + "\n".join(lines) + "\n\n"
        "`pdistill <command> --help` lists its groups and keys. -m runs every combination of key=a,b.\n"
        'Completion in bash: eval "$(pdistill --shell-completion install=bash)"'
    )


def of_command(command: str, subcommand: bool) -> str:
    """What `pdistill <command> --help` and `python <command>.py --help` print."""
    from pdistill.commands.settings import SETTINGS, conf

    program = f"pdistill {command}" if subcommand else f"python {command}.py"
    settings = SETTINGS[command]
    header = (conf() / f"{command}.yaml").read_text().split("defaults:")[0]
    about = "\n".join(line.lstrip("# ") if not line.startswith("#   ") else line[1:] for line in header.splitlines())
    keys = {field.name for field in dataclasses.fields(settings)}
    groups_of = keys - {"steps"} if command == "evaluate" else keys | {"experiment"}
    folders = sorted(p for p in conf().iterdir() if p.is_dir() and p.name in groups_of)
    groups = [f"  {p.name:<18}{', '.join(sorted(f.stem for f in p.glob('*.yaml')))}" for p in folders]
    return "\n".join(
        [
            f"usage: {program} [group=choice] [key=value] [-m] [--config-dir DIR] [--cfg job]",
            "",
            about.strip(),
            *(["", "Groups (group=choice):", *groups] if command != "sample" else []),
            "",
            "Keys (key=value):",
            *_keys(settings, "", {p.name for p in folders}),
        ]
    )


def _keys(settings: type, prefix: str, groups: set[str]) -> list[str]:
    lines, docs = [], field_docs(settings)
    last = {field.name for field in dataclasses.fields(Execution)}
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name in last):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            lines += _keys(type(default), f"{prefix}{field.name}.", groups)
        elif prefix or field.name not in groups:
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            lines.append(
                f"  {prefix}{field.name}={'' if default is dataclasses.MISSING else shown}  ({_type(field.type)})"
            )
            lines += textwrap.wrap(docs.get(field.name, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def keys_of(settings: type, prefix: str = "") -> list[str]:
    """The dotted keys of a command."""
    keys = []
    for field in dataclasses.fields(settings):
        nested = field.default_factory if isinstance(field.default_factory, type) else None
        keys += keys_of(nested, f"{field.name}.") if dataclasses.is_dataclass(nested) else [prefix + field.name]
    return keys


def field_docs(settings: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, inherited ones included."""
    docs: dict[str, str] = {}
    for cls in reversed(settings.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for statement, doc in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            ):
                docs[ast.unparse(statement.target)] = str(doc.value.value)
    return docs


def _type(annotation: Any) -> str:
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", None)
    return (name if name not in (None, "Optional", "Union") else str(annotation)).replace("None", "null")
