"""What the commands without a configuration share: a parser whose complaints are one line."""

import argparse
from pathlib import Path
from typing import NoReturn

from pdistill.commands.settings import conf
from pdistill.errors import UserError
from pdistill.registry import import_parts


class Parser(argparse.ArgumentParser):
    """argparse, but for a mistake it raises UserError instead of ending the process with its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see `{self.prog} --help`")


def without_imports(arguments: list[str]) -> list[str]:
    """Imports what `imports=[module,...]` among the arguments names, and gives the others back."""
    others = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not (key == "imports" and equals):
            others.append(argument)
            continue
        import_parts(filter(None, (part.strip(" '\"") for part in value.strip("[] ").split(","))))
    return others


def directory_of(argument: str) -> Path:
    """The directory that an argument names, by a path that ends in its name."""
    path = Path(argument).expanduser()
    return path.resolve() if path.name in ("", "..") else path


def with_folders(words: list[str]) -> list[str]:
    """The words of a command line, with `dataset=<folder or zip>` as Hydra knows it.

    That is dataset=image_folder dataset.path=<folder or zip>. A path begins with /, ~ or ., or it is there and
    holds a /, ends in .zip, or is no choice of the group.
    """
    own_choices = any(word.startswith(("--config", "-cd", "hydra.")) for word in words)
    found = []
    for word in words:
        value = word.removeprefix("dataset=").strip("\"'") if word.startswith("dataset=") else ""
        if not _is_path(value, own_choices):
            found.append(word)
            continue
        escaped = value.replace("'", "\\'")
        found += ["dataset=image_folder", f"dataset.path='{escaped}'"]
    return found


def _is_path(value: str, own_choices: bool) -> bool:
    if value.startswith(("/", "~", "./", "../")) or value in (".", ".."):
        return True
    looks_so = "/" in value or value.lower().endswith(".zip")
    is_choice = own_choices or (conf() / "dataset" / f"{value}.yaml").exists()
    return bool(value) and Path(value).exists() and (looks_so or not is_choice)
