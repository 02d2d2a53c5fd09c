"""A user's mistake in one line, whoever raised it: Hydra, OmegaConf, the operating system or the project."""

import difflib
import re
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from pdistill.commands import help as help_page
from pdistill.errors import UserError, printable

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, OSError)
TYPES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "bool": "true or false"}


def cause_of(error: BaseException) -> BaseException:
    """Of an error inside `instantiate`, what raised it."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause if isinstance(cause, UserError | ValueError | OSError | TypeError) else error


def one_line(error: BaseException) -> str:
    """A user's mistake in one line that names the key or the file, whoever raised it."""
    cause = cause_of(error)
    key = next((e.full_key for e in _chain(error) if getattr(e, "full_key", None)), None)
    if isinstance(error, OverrideParseException):
        text = _needs_quotes(error)
    elif isinstance(cause, UserError):
        text = str(cause)
    elif isinstance(cause, OSError) and cause.strerror:
        text = f"{cause.filename or ''}: {cause.strerror}".lstrip(": ")
    elif missing := not_installed(str(error), []):
        text = missing
    elif isinstance(error, HydraException | OmegaConfBaseException):
        text = _hydras(error, cause)
        text = f"{key}: {text}" if key and key not in text else text
    else:
        text = str(cause)
    if "Original Traceback" in text:  # from a process that makes batches: its last line is the error itself
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return printable(" ".join(text.split())) or type(cause).__name__


EXTRAS = {"submitit_slurm": "launchers", "submitit_local": "launchers", "joblib": "launchers", "optuna": "optuna"}


def not_installed(text: str, words: list[str]) -> str | None:
    """Of an error that says that a plugin of Hydra is missing: which extra brings it; None of other errors."""
    found = re.search(r"Could not find '(hydra/(?:launcher|sweeper))/(\w+)'", text)
    plugin = f"{found[1]}={found[2]}" if found else " ".join(words)
    if not found and not re.search(r"Unknown plugin class|No module named 'hydra_plugins", text):
        return None
    extra = next((extra for name, extra in EXTRAS.items() if name in plugin), None)
    return f"{plugin} is not installed: pip install 'pdistill[{extra}]'" if extra else None


def _chain(error: BaseException | None) -> list[Any]:
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _hydras(error: BaseException, cause: BaseException) -> str:
    """Hydra's and OmegaConf's complaints, in the words of the others."""
    text = "\n".join(str(e) for e in _chain(error))
    found = re.search(r"full_key: (\S+)", text)
    key = found[1] if found else "the value"
    if m := re.search(r"Value '(.*?)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", text):
        return f"{key}={m[1]} must be {TYPES.get(m[2], m[2])}"
    if "Non optional field cannot be assigned None" in text or "is not Optional" in text:
        return f"{key}=null must have a value"
    if (m := re.search(r"Error merging override (\S+)", text)) and "is not a ListConfig" in text:
        return f"{m[1]} must be a list, e.g. {m[1].partition('=')[0]}=[4,2,1]"
    if m := re.search(r"Could not override '(\S+?)'|Key '\w+' (?:is )?not in '\w+'\s+full_key: (\S+)", text):
        return _unknown_key(m[1] or m[2])
    if isinstance(cause, ValueError | TypeError):
        return str(cause)
    told = re.sub(r"^In '.*?': ", "", str(error)).split("Config search path")[0].strip()
    return (
        f"{told}; or a folder or zip of pictures by its path" if told.startswith("Could not find 'dataset/") else told
    )


def _unknown_key(key: str) -> str:
    from pdistill.commands.settings import SETTINGS

    known = {name for settings in SETTINGS.values() for name in help_page.keys_of(settings)}
    near = difflib.get_close_matches(key.lstrip("+"), known, 1)
    return f"there is no key {key}{f', did you mean {near[0]}?' if near else ''} (--help lists them)"


def _needs_quotes(error: OverrideParseException) -> str:
    key, equal, value = error.override.partition("=")
    if not equal:
        return f"{error.override}: expected key=value, e.g. {error.override}=true"
    character = next((c for c in value if not re.match(r"[\w/.:%+?*@$|\\ -]", c, re.ASCII)), None)
    if character is None or character in "[]{}":
        return f"{error.override}: {str(error).partition(' See ')[0]}"
    return (
        f"{error.override}: the value holds {character!r}, which needs quotes inside of the shell's: "
        f"'{key}=\"{value}\"'"
    )
