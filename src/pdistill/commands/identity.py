"""What lies at `teacher=` or `start=`: whose it is, and a name for its content. Without torch, which takes seconds."""

import hashlib
from pathlib import Path

from pdistill.files import digest_of_file


def is_imported(teacher: str | None) -> bool:
    """Whether `teacher` names a diffusers folder or a model on the hub, and no denoiser of ours."""
    if teacher is None:
        return False
    folder = Path(teacher).expanduser()
    return not (folder / "denoiser.json").exists() and ("/" in teacher or folder.is_dir())


def digest_of_denoiser(directory: str | None, revision: str | None = None) -> str | None:
    """Names the content of a denoiser's or a diffusers directory, wherever it lies; None for none.

    Of a model on the hub it is the commit that was fetched last; None before it was fetched.
    """
    if directory is None:
        return None
    folder = Path(directory).expanduser()
    if is_imported(directory) and not folder.is_dir():
        return _commit_of(directory, revision)
    kinds = (".safetensors", ".json", ".bin")
    files = sorted(p for p in folder.rglob("*") if p.suffix in kinds and p.is_file())
    lines = [f"{p.relative_to(folder)} {digest_of_file(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _commit_of(model: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("unet/config.json", "config.json"):
        try:
            path = try_to_load_from_cache(model, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(path, str):
            return Path(path.removesuffix(f"/{file}")).name  # .../snapshots/<commit>/<file>
    return None
