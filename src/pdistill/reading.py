"""Files that anybody may have written: read within limits, and as data alone.

What is read here is a regular file (a pipe would never end), of a size that was checked before, and never a pickle.
docs/security.md says what is promised of each kind of file.
"""

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdistill.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MOST_TEXT = 16 * 1024**2  # bytes of a file of JSON or YAML; as objects they take up to 25 times as much
MOST_HEADER = 16 * 1024**2  # bytes of the names and shapes in a safetensors file
DEEPEST = 100  # lists and objects inside of each other
LONGEST_NUMBER = 100  # digits; float() takes 308
MOST_PIXELS = 64 * 1024**2  # of an image that is decoded, or asked of a network: 8192 x 8192


def regular(path: Path) -> int:
    """The size of a file. Raises FileNotFoundError, and UserError for a pipe, a device or a directory."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file: put a file there, or take it away")
    return status.st_size


def text_of(path: Path, limit: int = MOST_TEXT) -> str:
    """The UTF-8 text of a file. Raises UserError where it is larger than `limit`, ValueError where it is no text."""
    size = regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} has {max(size, limit + 1):,} bytes, and at most {limit:,} are read of such a file")
    return content.decode("utf-8")


def json_of(text: str) -> Any:
    """The content of JSON. Raises ValueError for what is none, is nested too deeply, or says a key twice."""
    try:
        content = json.loads(text, object_pairs_hook=_each_key_once, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from error
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [inner for outer in level if isinstance(outer, list | dict) for inner in _values(outer)]
        if not level:
            return content
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _values(outer: list | dict) -> list:
    """The lists and objects in one."""
    values = outer.values() if isinstance(outer, dict) else outer
    return [value for value in values if isinstance(value, list | dict)]


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it says the key {twice[:50]!r} twice")
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


def check_tensors(path: Path) -> None:
    """Raises ValueError where a safetensors file claims more names and shapes than it holds, or than are read."""
    size = regular(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size, MOST_HEADER):
        raise ValueError(f"{path.name} of {size} bytes claims a header of {header}, and at most {MOST_HEADER} are read")


def tensors_of(path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file. Raises ValueError, OSError or SafetensorError where it is damaged."""
    from safetensors.torch import load_file

    check_tensors(path)
    return load_file(path)


def array_of(path: Path, dtype: str, shape: Sequence[int | None]) -> "np.ndarray":
    """The array of an .npy file, which has this type, and this length where one is given, in each dimension.

    Raises ValueError for another one, and for one that is pickled, or claims more than the file holds.
    """
    import numpy as np

    regular(path)
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # which, unlike reading, allocates nothing
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever numpy's reading of the header meets: tokens, syntax, numbers, depth, memory
        raise ValueError(f"{path.name} is no array of numbers ({type(error).__name__})") from error
    fits = isinstance(mapped, np.ndarray) and mapped.dtype == dtype and mapped.ndim == len(shape)
    if not fits or any(want not in (None, have) for want, have in zip(shape, mapped.shape, strict=True)):
        found = f"{mapped.dtype} {mapped.shape}" if isinstance(mapped, np.ndarray) else "an archive"
        raise ValueError(f"{path.name} holds {found}, not {dtype} {tuple(shape)}")
    return np.array(mapped)
