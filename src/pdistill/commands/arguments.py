"""What the commands without a configuration share: a parser whose complaints are one line."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pdistill.errors import Interrupted, UserError, first_line


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
        for module in filter(None, (part.strip(" '\"") for part in value.strip("[] ").split(","))):
            try:
                importlib.import_module(module)
            except Exception as error:  # whatever the user's module raises
                raise UserError(f"imports={value}: {module} cannot be imported ({first_line(error)})") from error
    return others


def directory_of(argument: str) -> Path:
    """The directory that an argument names, by a path that ends in its name."""
    path = Path(argument).expanduser()
    return path.resolve() if path.name in ("", "..") else path


def run_as_script(main: Callable[[list[str]], None]) -> None:
    """Runs a command with the process's arguments; a user's mistake is one line and exit status 2."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError, Interrupted) as error:
        of_file = isinstance(error, OSError) and error.filename is not None
        text = f"{error.filename}: {error.strerror}" if of_file else first_line(error)  # type: ignore[union-attr]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
