"""What the commands without a configuration share: a parser whose complaints are one line."""

import argparse
from pathlib import Path
from typing import NoReturn

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
