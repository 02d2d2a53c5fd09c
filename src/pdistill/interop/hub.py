"""Models on the hub, fetched file by file: what tells of them first, then their weights."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from pdistill.errors import UserError, first_line

LAYOUT = "model_index.json, unet/config.json with its .safetensors and scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
# What is fetched until there are weights: safetensors rather than pickles, full rather than half precision.
WEIGHT_FILES = [(f"{WEIGHTS}*.safetensors", "*.fp16*"), (f"{WEIGHTS}*.bin", "*.fp16*"), (f"{WEIGHTS}*.fp16*", None)]


def fetched(
    model: str, revision: str | None, allow: Sequence[str] = ("*.json", "*/*.json"), ignore: str | None = None
) -> Path:
    """The folder of a model on the hub, with the files of these patterns, from the cache where they are there.

    Raises UserError where the hub is not reached or does not give it.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=list(allow), ignore_patterns=ignore
            )
        )
    except GatedRepoError as error:
        raise UserError(f"{model} on the hub is gated: accept its terms on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{model} is no folder here and no model on the hub that you may read: check the name, or, if it is "
            f"private, `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{model} on the hub has no revision {revision}: give a branch, tag or commit of it") from error
    except Exception as error:  # of the connection, the cache and the disk, of many kinds
        raise UserError(
            f"{model} is no folder here, and the hub does not give it ({type(error).__name__}: {first_line(error)}): "
            f"go online, or give a folder that holds {LAYOUT}"
        ) from error


def fetch_weights(model: str, revision: str | None, unet: Path) -> None:
    """Fetches the weights of the network in the sub-folder `unet` of a model on the hub, into the cache."""
    for pattern, ignored in WEIGHT_FILES:
        folder = fetched(model, revision, [str(unet / pattern)], ignored)
        if any((folder / unet).glob(pattern)):
            return


def fetch_components(model: str, revision: str | None, names: Sequence[str]) -> None:
    """Fetches whole sub-folders of a model on the hub, in safetensors of full precision, into the cache."""
    patterns = [f"{name}/{files}" for name in names for files in ("*.safetensors", "*.txt")]
    fetched(model, revision, patterns, "*.fp16*")
