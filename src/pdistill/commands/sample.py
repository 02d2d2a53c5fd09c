"""`pdistill sample`: a grid of pictures from a denoiser."""

from pathlib import Path

from omegaconf import DictConfig

from pdistill.commands.settings import Sample, settings_of
from pdistill.errors import UserError


def main(cfg: DictConfig) -> None:
    """Draws the pictures and says where they are."""
    settings: Sample = settings_of(cfg)
    if settings.denoiser is None:
        raise UserError("denoiser=<directory> is missing, e.g. denoiser=outputs/demo/steps-0004/denoiser")
    print(f"wrote {draw(settings, Path(settings.denoiser).expanduser())}")


def draw(settings: Sample, directory: Path) -> Path:
    """The grid's path. Raises UserError where the settings do not fit the denoiser."""
    import torch
    from torchvision.utils import save_image

    from pdistill.denoiser import Denoiser
    from pdistill.files import whole
    from pdistill.generation import Draw, generate
    from pdistill.processes import device_of
    from pdistill.report.grids import save_grid

    denoiser = Denoiser.load(directory)
    num_steps = settings.num_steps or denoiser.num_steps
    if num_steps is None:
        raise UserError(f"denoiser={directory} is a teacher, made for no step count of its own: give num_steps=...")
    device = device_of(settings.device)
    options = {k: getattr(settings, k) for k in ("seed", "batch_size", "sampler", "clip", "guidance", "variance")}
    words = {"labels": _labels(settings, denoiser.num_classes), "prompts": _prompts(settings, denoiser.codec)}
    plan = Draw(num_steps, **words, **options)
    batches = generate(denoiser.to(device), range(settings.num_images), plan, device)
    try:
        images = torch.cat([batch.cpu() for batch in batches])
    except ValueError as error:  # an unknown sampler or variance, guidance without a null label
        raise UserError(str(error)) from error
    default = f"{name_of(directory)}-{num_steps}-steps-seed-{settings.seed}.png"
    grid = Path(settings.output or Path(settings.output_root, "samples", default)).expanduser()
    grid.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, grid)
    if settings.individual:
        folder = grid.with_suffix("")
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            with whole(folder / f"{i:05d}.png") as temporary:
                save_image(image, temporary, normalize=True, value_range=(-1, 1), format="png")
    return grid


def _labels(settings: Sample, num_classes: int | None) -> list[int] | None:
    if settings.label is None:
        return None
    labels = settings.label if isinstance(settings.label, list) else [settings.label]
    if num_classes is None:
        raise UserError(
            f"label={settings.label} is given, and denoiser={settings.denoiser} is not class-conditional: leave it out"
        )
    if not all(k < num_classes for k in labels):
        raise UserError(f"label={settings.label} must be of the classes 0 to {num_classes - 1}")
    return labels


def _prompts(settings: Sample, codec: object | None) -> list[str] | None:
    if settings.prompt is None:
        return None
    if codec is None:
        raise UserError(
            f"prompt={settings.prompt} is given, and denoiser={settings.denoiser} has no text encoder: leave it out"
        )
    return settings.prompt if isinstance(settings.prompt, list) else [settings.prompt]


def name_of(denoiser: Path) -> str:
    """outputs/demo/steps-0004/denoiser -> demo-steps-0004"""
    return "-".join(denoiser.resolve().parts[-3:-1])
