"""A W&B report of a project's runs: `python -m pdistill.wandb_report <entity>/<project>`; W&B must be online.

The runs' table with the FID of every stage as columns, bars of these, losses, and the grids of samples. Needs
`pip install 'pdistill[wandb-report]'`.
"""

import sys

from pdistill.errors import UserError


def build(entity: str, project: str, figures: list[str]):
    """The report, not yet saved; `figures` are summary columns such as "steps_0008/fid", best-known stage first.

    Raises UserError where wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError("this needs wandb-workspaces: pip install 'pdistill[wandb-report]'") from error
    columns = ["run:displayName", *(f"summary:{figure}" for figure in figures)]
    prefixes = list(dict.fromkeys(figure.partition("/")[0] for figure in figures))
    settings = ["config:seed.value", "config:steps.value", "run:runtime"]
    table = {"pinned_columns": columns[:1], "visible_columns": [*columns[1:], *settings], "lock_columns": True}
    panels = [
        wr.BarPlot(title="FID by stage", metrics=[wr.SummaryMetric(figure) for figure in figures]),
        wr.LinePlot(title="Loss", y=[f"{prefix}/loss" for prefix in prefixes], log_y=True),
        wr.LinePlot(title="Images per second", y=[f"{prefix}/images_per_second" for prefix in prefixes]),
        wr.MediaBrowser(title="Samples", media_keys=[*(f"{prefix}/samples" for prefix in prefixes), "comparison"]),
    ]
    runs = wr.Runset(entity=entity, project=project, name="runs", **table)
    return wr.Report(
        entity=entity,
        project=project,
        title="Progressive distillation",
        description="Quality against step count, over the runs of this project",
        blocks=[wr.PanelGrid(runsets=[runs], panels=panels)],
        width="fluid",
    )


def main(path: str) -> str:
    """Saves the report of entity/project and returns its address. Raises UserError where W&B does not let us."""
    import wandb

    entity, _, project = path.partition("/")
    if not (entity and project):
        raise UserError("give the project: python -m pdistill.wandb_report <entity>/<project>")
    try:
        keys = {key for run in wandb.Api().runs(path) for key in dict(run.summary)}
        figures = sorted((k for k in keys if k.partition("/")[2].startswith("fid")), reverse=True)
        if not figures:
            raise UserError(f"no run of {path} has a figure such as steps_0008/fid yet")
        report = build(entity, project, figures)
        report.save()
    except UserError:
        raise
    except Exception as error:  # requests', wandb's and GraphQL's own, of many kinds
        raise UserError(f"W&B refuses ({str(error).splitlines()[0]}): check `wandb login` and {path}") from error
    return report.url


if __name__ == "__main__":
    try:
        print(main(*sys.argv[1:2] or [""]))
    except UserError as error:
        sys.exit(f"error: {error}")
