"""Loggers, and what a finished stage tells them beside its scalars."""

import os
import uuid
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def wandb_logger(directory: str, name: str, project: str, **options) -> WandbLogger:
    """W&B under one run id for the run directory's whole life; offline unless logged in; it never prompts.

    `options` go to `wandb.init` (entity, group, tags, ...).
    """
    import wandb

    id_file = Path(directory) / "wandb_id.txt"
    if rank_zero_only.rank == 0 and not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled") or not wandb.login(prompt=False)
    return WandbLogger(
        save_dir=directory,
        name=name,
        project=project,
        id=id_file.read_text() if id_file.exists() else None,
        offline=offline,
        **({"mode": "offline"} if offline else {}),
        **options,
    )


@rank_zero_only
def log_stage(loggers: list[Logger], prefix: str, row: dict, directory: Path, run_name: str) -> None:
    """A finished stage: its figures, its grid as an image and, for W&B, its denoiser as an artifact.

    The artifact's lineage is in its metadata, and online in W&B's graph: the run uses the teacher that it
    distils and logs the student.
    """
    figures = {f"{prefix}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
    for logger in loggers:
        logger.log_metrics(figures)
        if isinstance(logger, TensorBoardLogger):
            picture = pil_to_tensor(Image.open(directory / "samples.png"))
            logger.experiment.add_image(f"{prefix}/samples", picture)
        elif isinstance(logger, WandbLogger):
            _log_to_wandb(logger.experiment, prefix, row, directory, run_name)


def _log_to_wandb(run, prefix: str, row: dict, directory: Path, run_name: str) -> None:
    import wandb

    run.log({f"{prefix}/samples": wandb.Image(str(directory / "samples.png"))})
    artifact = wandb.Artifact(_artifact_name(run_name, prefix), type="denoiser", metadata=row)
    artifact.add_dir(str(directory / "denoiser"))
    if row["parent"] and not run.offline:
        run.use_artifact(f"{_artifact_name(run_name, row['parent'])}:latest")
    run.log_artifact(artifact)
    if not run.offline:
        artifact.wait()


def _artifact_name(run_name: str, prefix: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{run_name}-{prefix}")


@rank_zero_only
def log_summary(loggers: list[Logger], rows: list[dict], comparison: Path) -> None:
    """The whole run, for W&B: the table of its stages and the comparison sheet."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            columns = [k for k in rows[-1] if k != "provenance"]
            table = wandb.Table(columns=columns, data=[[row.get(k) for k in columns] for row in rows])
            logger.experiment.log({"summary": table, "comparison": wandb.Image(str(comparison))})
            logger.experiment.summary.update({"provenance": rows[0].get("provenance", {})})


@rank_zero_only
def close(loggers: list[Logger]) -> None:
    """Writes what is pending; ends the W&B run, so that the next job of a sweep gets one of its own."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
