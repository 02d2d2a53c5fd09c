"""Loggers, and what a finished stage tells them beside its scalars."""

import contextlib
import hashlib
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pdistill import files, processes
from pdistill.errors import Interrupted, UserError, first_line

Status = Literal["success", "failed", "interrupted"]
EXIT_CODES: dict[Status, int] = {"success": 0, "failed": 1, "interrupted": Interrupted.exit_code}
MOST_CHARACTERS = 128  # of W&B's names of runs, projects and artifacts
NOT_IN_PROJECTS = "/\\#?%:"


def wandb_logger(directory: str, name: str, project: str, **options: Any) -> WandbLogger:
    """W&B under one run id for the run directory's whole life; offline unless logged in; it never prompts.

    `options` go to `wandb.init` (entity, group, tags, ...). The run is opened at once, so that whatever W&B does not
    accept is refused before any work starts: raises UserError for a project name, an option or a key that it refuses.
    """
    import wandb

    if not 0 < len(project) <= MOST_CHARACTERS or set(project) & set(NOT_IN_PROJECTS):
        raise UserError(
            f"logger.project={project} must have 1 to {MOST_CHARACTERS} characters, none of {' '.join(NOT_IN_PROJECTS)}"
        )
    offline = _is_offline()
    logger = WandbLogger(
        save_dir=directory,
        name=shortened(name),
        project=project,
        id=_run_id(Path(directory)),
        offline=offline,
        **({"mode": "offline"} if offline else {}),
        **options,
    )
    if processes.is_main():
        try:
            _ = logger.experiment  # opens the run
        except (wandb.Error, ValueError, TypeError) as error:
            raise UserError(
                f"logger=wandb: W&B does not open a run ({_reason(error)}): check logger.* and your key, or set "
                f"WANDB_MODE=offline and upload later"
            ) from error
    return logger


def _run_id(directory: Path) -> str | None:
    """The id that a run directory's runs share; kept in a file by the main process."""
    file = directory / "wandb_id.txt"
    if processes.is_main() and not file.exists():
        files.write_text(file, uuid.uuid4().hex[:8])
    return file.read_text().strip() if file.exists() else None


def _is_offline() -> bool:
    """Whether W&B is told to be offline or has no key. Raises UserError for a key that it refuses."""
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or not processes.is_main():
        return True
    try:
        return not wandb.login(prompt=False)
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"logger=wandb: W&B refuses the key ({_reason(error)}): put a valid one into WANDB_API_KEY, or use "
            f"`wandb login`, or set WANDB_MODE=offline and upload later"
        ) from error


def _reason(error: Exception) -> str:
    """The error in one line; of a failed check of settings, which setting and why."""
    if not hasattr(error, "errors"):
        return first_line(error)
    checks = cast(Any, error).errors()  # pydantic's, whose first line only counts them
    return "; ".join(f"{'.'.join(map(str, check['loc']))}: {check['msg']}" for check in checks)


def shortened(name: str, limit: int = MOST_CHARACTERS) -> str:
    """The name, or its beginning and a hash of the whole where it has more than `limit` characters."""
    if len(name) <= limit:
        return name
    return f"{name[: limit - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def artifact_name(run_name: str, prefix: str) -> str:
    """A name that W&B accepts for an artifact, with a hash where another name would have become the same."""
    whole = f"{run_name}-{prefix}"
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", whole)
    if plain != whole:
        plain = f"{plain}-{hashlib.sha256(whole.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return shortened(plain)


def metric_prefix(stage_name: str) -> str:
    """ "steps-0016" -> "steps_0016", the name under which its scalars are logged."""
    return stage_name.replace("-", "_")


def log_stage(loggers: Sequence[Logger], stage: str, row: Mapping[str, Any], directory: Path, run_name: str) -> None:
    """A finished stage: its metrics, its grid as an image and, for W&B, its denoiser as an artifact.

    `row` are its metrics and `parent`, the stage that it started from, or None; `directory` is the stage's. The
    artifact's lineage is in its metadata, and online in W&B's graph: the run uses the teacher that it distils and
    logs the student.
    """
    if not processes.is_main():
        return
    prefix = metric_prefix(stage)
    scalars = {f"{prefix}/{k}": float(v) for k, v in row.items() if isinstance(v, int | float)}
    for logger in loggers:
        with _telling(logger):
            logger.log_metrics(scalars)
    log_picture(loggers, f"{prefix}/samples", directory / "samples.png")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with _telling(logger):
                _log_to_wandb(logger.experiment, prefix, row, directory, run_name)


def log_picture(loggers: Sequence[Logger], key: str, file: Path, step: int | None = None) -> None:
    """A picture, of a training at an update if `step` is given, for those loggers that take pictures."""
    for logger in loggers:
        with _telling(logger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(key, pil_to_tensor(Image.open(file)), step)
            elif isinstance(logger, WandbLogger):
                import wandb

                pictures: dict[str, Any] = {key: wandb.Image(str(file))}
                logger.log_metrics(pictures, step)


def _log_to_wandb(run: Any, prefix: str, row: Mapping[str, Any], directory: Path, run_name: str) -> None:
    import wandb

    artifact = wandb.Artifact(artifact_name(run_name, prefix), type="denoiser", metadata=dict(row))
    artifact.add_dir(str(directory / "denoiser"))
    if row.get("parent") and not run.offline:
        run.use_artifact(f"{artifact_name(run_name, metric_prefix(row['parent']))}:latest")
    run.log_artifact(artifact)
    if not run.offline:
        artifact.wait()


def log_summary(loggers: Sequence[Logger], rows: Sequence[Mapping[str, Any]], comparison: Path) -> None:
    """The whole run, for W&B: the table of its stages and the comparison sheet."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and processes.is_main():
            import wandb

            with _telling(logger):
                columns: list[Any] = [k for k, v in rows[-1].items() if not isinstance(v, dict | list)]
                table = wandb.Table(columns=columns, data=[[row.get(k) for k in columns] for row in rows])
                logger.experiment.log({"summary": table, "comparison": wandb.Image(str(comparison))})
                logger.experiment.summary.update({"provenance": rows[0].get("provenance", {})})


@contextlib.contextmanager
def _telling(logger: Logger) -> Iterator[None]:
    """A finished stage is on disk: a logger whose server has gone gets a line on stderr, and the run goes on."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ConnectionError | TimeoutError) and not type(error).__module__.startswith("wandb."):
            raise
        print(f"{type(logger).__name__} did not take everything ({first_line(error)})", file=sys.stderr)


@contextlib.contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Closes the loggers when the block ends, with what became of it: success, failed or interrupted."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        close(loggers, "interrupted")
        raise
    except BaseException:
        close(loggers, "failed")
        raise
    close(loggers, "success")


def close(loggers: Sequence[Logger], status: Status = "success") -> None:
    """Writes what is pending; ends the W&B run, so that the next job of a sweep gets one of its own.

    W&B shows a run that failed as failed, and one that was interrupted as preempted, which the same command resumes.
    """
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger) and processes.is_main():
            with _telling(logger):
                if status == "interrupted":
                    logger.experiment.mark_preempting()
                logger.experiment.finish(exit_code=EXIT_CODES[status])
