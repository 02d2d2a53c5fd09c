"""A W&B project: its runs as they are known there, and a W&B report of them. W&B must be online.

The report is the runs' table with the FID of every stage as columns, bars of these, losses, and the grids of samples.
It needs `pip install 'pdistill[wandb-report]'`.
"""

from dataclasses import dataclass
from typing import Any

from pdistill.errors import UserError, first_line
from pdistill.metrics.provenance import is_provenance
from pdistill.report.runs import finite, is_row, place_in_table
from pdistill.steps import TEACHERS


@dataclass(frozen=True)
class Project:
    """entity/project. Raises UserError for anything else."""

    path: str

    def __post_init__(self) -> None:
        entity, _, project = self.path.partition("/")
        if not (entity and project) or "/" in project:
            raise UserError(f"wandb:{self.path} names no project of W&B: give wandb:<entity>/<project>")

    def runs(self) -> list[Any]:
        """wandb's own run objects. Raises UserError where W&B does not give them, or there are none."""
        import wandb

        try:
            runs = list(wandb.Api().runs(self.path))
        except Exception as error:  # requests', wandb's and GraphQL's own, of many kinds
            raise UserError(
                f"W&B does not give the runs of {self.path} ({first_line(error)}): check the name, and `wandb login`"
            ) from error
        if not runs:
            raise UserError(f"the W&B project {self.path} holds no runs: check its name, or train with logger=wandb")
        return runs


def stages_of(summary: dict[str, Any]) -> list[dict]:
    """The rows of the stages that a run's summary holds, teacher first; a stage counts if its step count is there."""
    stages: dict[str, dict] = {}
    for key, value in summary.items():
        prefix, _, name = key.partition("/")
        if name and (prefix in TEACHERS or prefix.startswith("steps_")):
            stages.setdefault(prefix.replace("_", "-"), {})[name] = value
    told: Any = summary.get("provenance")  # an object of wandb's own, or a dict
    made_with = {"provenance": dict(told)} if hasattr(told, "keys") and is_provenance(dict(told)) else {}
    rows: list[dict[str, Any]] = [
        row | {"stage": stage, "num_steps": int(row["num_steps"])} | made_with
        for stage, row in stages.items()
        if finite(row.get("num_steps"))
    ]
    return sorted(filter(is_row, rows), key=place_in_table)


def build(project: Project, metrics: list[str]) -> Any:
    """The report, not yet saved; `metrics` are summary columns such as "steps_0008/fid", best-known stage first.

    Raises UserError where wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError("this needs wandb-workspaces: pip install 'pdistill[wandb-report]'") from error
    columns = ["run:displayName", *(f"summary:{metric}" for metric in metrics)]
    prefixes = list(dict.fromkeys(metric.partition("/")[0] for metric in metrics))
    settings = ["config:seed.value", "config:steps.value", "run:runtime"]
    table: dict[str, Any] = {"pinned_columns": columns[:1], "visible_columns": [*columns[1:], *settings]}
    panels = [
        wr.BarPlot(title="FID by stage", metrics=[wr.SummaryMetric(metric) for metric in metrics]),
        wr.LinePlot(title="Loss", y=[f"{prefix}/loss" for prefix in prefixes], log_y=True),
        wr.LinePlot(title="Images per second", y=[f"{prefix}/images_per_second" for prefix in prefixes]),
        wr.MediaBrowser(title="Samples", media_keys=[*(f"{prefix}/samples" for prefix in prefixes), "comparison"]),
    ]
    entity, _, name = project.path.partition("/")
    runs = wr.interface.Runset(entity=entity, project=name, name="runs", lock_columns=True, **table)
    return wr.interface.Report(
        entity=entity,
        project=name,
        title="Progressive distillation",
        description="Quality against step count, over the runs of this project",
        blocks=[wr.PanelGrid(runsets=[runs], panels=panels)],
        width="fluid",
    )


def publish(path: str) -> str:
    """Saves the report of entity/project and returns its address. Raises UserError where W&B does not let us."""
    project = Project(path)
    try:
        keys = {key for run in project.runs() for key in dict(run.summary)}
        metrics = sorted((k for k in keys if _is_fid(k.partition("/")[2])), reverse=True)
        if not metrics:
            raise UserError(f"no run of {path} has a metric such as steps_0008/fid yet: wait for a stage to finish")
        report = build(project, metrics)
        report.save()
    except UserError:
        raise
    except Exception as error:  # requests', wandb's and GraphQL's own, of many kinds
        raise UserError(f"W&B refuses ({first_line(error)}): check `wandb login` and {path}") from error
    return report.url


def _is_fid(name: str) -> bool:
    return name.startswith("fid") and not name.endswith("_std")
