"""Checkpoints of a stage: written whole, with the one before kept; and what must fit when one is resumed."""

import hashlib
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO

from pdistill import __version__, processes
from pdistill.errors import UserError, first_line, printable
from pdistill.files import remove_partial, whole
from pdistill.reading import regular
from pdistill.training.settings import Execution

ROUNDING = {key: str(getattr(Execution(), key)) for key in ("compile", "channels_last", "matmul_precision")}
SEAL = b"pdistill sha256 "
KINDS = {"state_dict": dict, "loops": dict, "optimizer_states": list, "global_step": int}  # of a checkpoint's parts
LAST, PREVIOUS, DAMAGED = "last.ckpt", "previous.ckpt", "damaged.ckpt"


class WholeCheckpoints(CheckpointIO):
    """Writes beside the target, flushes, and replaces; the file before becomes previous.ckpt, in case of damage.

    At every moment one of the two is whole, whatever becomes of the process or the machine.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises UserError where the directory cannot be written to."""
        path = Path(path)
        try:
            with whole(path) as temporary:
                torch.save(checkpoint, temporary)
                _seal(temporary)
                if path.exists():
                    path.replace(path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            before = any(file.exists() for file in (path, path.with_name(PREVIOUS)))
            raise UserError(
                f"the checkpoint {path} cannot be written ({first_line(error)}): make room, or see to the permissions; "
                f"the same command {'continues from the checkpoint before' if before else 'starts this stage anew'}"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at `path`, or the one before where it is damaged; every process loads the main one's choice.

        Raises UserError if neither can be used.
        """
        chosen = processes.of_main(_chosen(Path(path)) if processes.is_main() else None)
        if isinstance(chosen, str):
            raise UserError(chosen)
        try:
            content = torch.load(chosen, map_location=map_location, weights_only=True)
        except Exception as error:  # it is whole, so something in it is not to torch's liking
            raise UserError(
                f"{chosen} cannot be loaded ({first_line(error)}): optimizers and callbacks may keep tensors, numbers, "
                f"texts, lists and dictionaries in checkpoints, nothing else"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(content.get(k), kind) for k, kind in KINDS.items()):
            raise UserError(f"{chosen} is no checkpoint of a stage: delete {chosen.parent} to start this stage anew")
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes the checkpoint and the one before."""
        path = Path(path)
        for file in (path, path.with_name(PREVIOUS), path.with_name(DAMAGED)):
            file.unlink(missing_ok=True)
        remove_partial(path.parent)


def there_is_one(directory: Path) -> bool:
    """Whether a stage's directory holds a checkpoint; the main process's answer."""
    return processes.of_main((directory / LAST).exists() or (directory / PREVIOUS).exists())


def _chosen(path: Path) -> Path | str:
    """The whole one of a checkpoint and its predecessor; a message if there is none. A damaged one is put aside."""
    previous = path.with_name(PREVIOUS)
    fault = _fault(path)
    if fault is None:
        return path
    if other := _fault(previous):
        return (
            f"{path} is {fault} and {previous} is {other}: delete {path.parent} to start this stage anew; "
            f"finished stages are kept"
        )
    print(f"{path} is {fault}; continuing from {PREVIOUS}, the checkpoint before", file=sys.stderr)
    if path.exists():
        path.replace(path.with_name(DAMAGED))  # else the next checkpoint would put it in the place of the one before
    return previous


def _fault(file: Path) -> str | None:
    """What is wrong with a file that torch.save wrote, by its own checksums; None if nothing is."""
    if not file.exists():
        return "missing"
    if _is_changed(file):
        return "damaged (its content is not what was written)"
    try:
        size = regular(file)
        with zipfile.ZipFile(file) as content:
            members = content.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                return "damaged (it is compressed, as torch.save never writes it)"  # to unpack it may take for ever
            broken = content.testzip()
    except Exception as error:  # zipfile's, of many kinds
        return f"damaged ({first_line(error)})"
    return None if broken is None else f"damaged (in {printable(broken)})"


def _seal(file: Path) -> None:
    """Puts a digest of all that torch.save wrote at its end, where a zip file may have a comment.

    Its own checksums are of its records; a table of contents with a flipped bit is read as it stands, or ends torch.
    """
    with file.open("r+b") as content:
        end = content.seek(-2, os.SEEK_END)
        content.write((len(SEAL) + 64).to_bytes(2, "little") + SEAL)
        digest = _digest(content, end + 2 + len(SEAL))
        content.seek(0, os.SEEK_END)
        content.write(digest)


def _is_changed(file: Path) -> bool:
    """Whether a checkpoint that was sealed is not what was written; those of 0.2.0 were not."""
    if not file.exists() or (size := file.stat().st_size) < len(SEAL) + 64:
        return False
    with file.open("rb") as content:
        content.seek(size - 64 - len(SEAL))
        seal, noted = content.read(len(SEAL)), content.read()
        return seal == SEAL and _digest(content, size - 64) != noted


def _digest(content: IO[bytes], size: int) -> bytes:
    """64 hexadecimal digits of the first `size` bytes."""
    digest = hashlib.sha256()
    content.seek(0)
    while part := content.read(min(2**20, size)):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()


class Batching(Callback):
    """Lets a stage be resumed with other devices, accumulated batches or precision, from the update it stood at.

    Lightning counts batches, and would start the resumed windows of accumulated batches somewhere inside; the counts
    are put to where the new windows begin. The images of each update stay the same, and so does their noise on one kind
    of device, dropout apart, but not its rounding: the user is told.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes how this run makes its updates."""
        checkpoint["pdistill"] = {"version": __version__, "batching": batching(trainer, pl_module)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the counts right. Raises UserError for a checkpoint of 0.1.0, whose random keys were others."""
        noted = checkpoint.get("pdistill")
        if noted is None:
            raise UserError(
                f"{trainer.ckpt_path} was written by version 0.1.0, which drew other random numbers: finish this run "
                f"with 0.1.0, or start it anew with overwrite=true"
            )
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts |= dict.fromkeys(("ready", "started", "processed"), batches) | {"completed": batches - 1}
        if processes.is_main() and (line := _changes(noted["batching"], batching(trainer, pl_module))):
            print(line, file=sys.stderr)


def batching(trainer: Trainer, module: Any) -> dict[str, int | str]:
    """What decides how an update is drawn and rounded, beside its seed."""
    return {
        "accelerator": trainer.strategy.root_device.type,
        "devices": trainer.world_size,
        "accumulated batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
    } | {key: str(getattr(module.recipe.execution, key)) for key in ROUNDING}


def _changes(before: Mapping[str, int | str], now: Mapping[str, int | str]) -> str:
    before = {**ROUNDING, **before}  # of versions without these keys
    changes = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
    if not changes:
        return ""
    return (
        f"resumed with {', '.join(changes)}: every update still sees the same images, but rounding, and "
        f"perhaps dropout or noise, differs, so the result is not the same to the byte as that of an undisturbed run"
    )
