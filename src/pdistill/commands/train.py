"""`pdistill train`: a teacher, in `<output_root>/<name>/teacher`."""

from omegaconf import DictConfig

from pdistill.commands import launching, run_directory
from pdistill.commands.settings import Train, settings_of
from pdistill.lazy import quick_imports
from pdistill.processes import is_main


def main(cfg: DictConfig) -> float | None:
    """Trains the teacher, or goes on, or says that it is finished; returns its metric."""
    settings: Train = settings_of(cfg)
    directory, finished = run_directory.find(cfg, result="teacher/metrics.json")
    if finished:
        print(f"{directory} is finished; overwrite=true would run it again")
    else:
        launching.check_trainer(settings.trainer)
        with quick_imports():  # torch and what it imports: seconds that a finished run need not wait
            from pdistill.commands.stages import train

        train(settings, cfg, directory)
    if is_main():
        print((directory / "teacher" / "metrics.json").read_text() + f"teacher: {directory / 'teacher' / 'denoiser'}")
    return run_directory.last_metric(directory)
