"""`pdistill distill`: a teacher and its students, to `<output_root>/<name>/summary.json` and report.html."""

from omegaconf import DictConfig

from pdistill.commands import launching, run_directory
from pdistill.commands.recipe import read_recipe
from pdistill.commands.settings import Distill, settings_of
from pdistill.lazy import quick_imports
from pdistill.processes import is_main


def main(cfg: DictConfig) -> float | None:
    """Runs all stages, or goes on, or says that they are finished; returns the last student's metric."""
    settings_of(cfg)  # refuses wrong values first
    read_recipe(cfg)
    settings: Distill = settings_of(cfg)
    directory, finished = run_directory.find(cfg, result="summary.json")
    if finished:
        print(f"{directory} is finished; overwrite=true would run it again")
    else:
        launching.check_trainer(settings.trainer)
        with quick_imports():  # torch and what it imports: seconds that a finished run need not wait
            from pdistill.commands.stages import distill

        distill(settings, cfg, directory)
    if is_main():
        from pdistill.commands.report import show

        show(directory)
    return run_directory.last_metric(directory)
