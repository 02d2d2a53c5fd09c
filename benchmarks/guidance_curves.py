"""Guided students beside their teacher: the distance and the asked class, against the guidance, over seeds.

    python evaluate.py denoiser=outputs/guided-seed-0 guidance=[1,1.5,2,3,5] baselines=[ddim] bootstrap=0 \\
        +metrics.extractor.seed=1 +metrics.extractor.width=48
    python benchmarks/guidance_curves.py outputs/evaluations/guided-seed-*.json --output docs/guidance.png

Reads rows that evaluate.py wrote, of runs that differ in their seeds, and of stages of these by themselves; writes the
picture, and prints the tables: means over the seeds, with their standard deviations.
"""

import argparse
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pdistill.errors import UserError
from pdistill.files import read_json
from pdistill.report.plots import save
from pdistill.report.rounding import mean_and_spread
from pdistill.report.tables import markdown

STAGES = {"teacher": "teacher", "guided": "student of the stage guided"}  # by the directory; others were distilled
Values = dict[float, list[float]]  # guidance -> one value for each seed


def curves(files: list[Path]) -> dict[tuple[str, int, int], dict[str, Values]]:
    """(whose images, steps, network evaluations) -> metric -> values. Raises UserError for files without such rows."""
    found: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in [row for file in files for row in read_json(file, [])]:
        made_with = row["provenance"]
        if made_with.get("guidance") is None or "class_accuracy" not in row:
            continue
        steps = made_with["num_steps"]
        whose = STAGES.get(Path(made_with["denoiser"]).parent.name, "student")
        key = whose, steps, made_with.get("network_evaluations", steps)
        for metric in (next(k for k in row if k.startswith("fid") and not k.endswith("_std")), "class_accuracy"):
            found[key[:2]][metric][made_with["guidance"]].append((row[metric], key[2]))
    if not found:
        raise UserError("no rows with guidance and class_accuracy: run evaluate.py guidance=[1,2,3] metrics=classifier")
    return {
        (*key, max(n for values in metrics["class_accuracy"].values() for _, n in values)): {
            metric: {g: [v for v, _ in values[g]] for g in sorted(values)} for metric, values in metrics.items()
        }
        for key, metrics in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1]))
    }


def tables(found: dict[tuple[str, int, int], dict[str, Values]]) -> list[str]:
    """Lines of Markdown, a table for each metric."""
    guidances = sorted({g for metrics in found.values() for values in metrics.values() for g in values})
    lines = []
    for metric in next(iter(found.values())):
        rows = [
            [whose, str(steps), str(evaluations), *(mean_and_spread(metrics[metric].get(g, [])) for g in guidances)]
            for (whose, steps, evaluations), metrics in found.items()
        ]
        headings = [f"{metric} of", "steps", "evaluations", *(f"g = {g:g}" for g in guidances)]
        lines += [*markdown(headings, rows), ""]
    return lines


def draw(found: dict[tuple[str, int, int], dict[str, Values]]) -> Figure:
    """Two panels, a line for each of whose images and steps; bands are the range over seeds."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    metrics = list(next(iter(found.values())))
    for axis, metric in zip(figure.subplots(1, 2), metrics, strict=True):
        for ((whose, steps, evaluations), values), marker in zip(found.items(), cycle("osD^vPX<>"), strict=False):
            points = values[metric]
            means = [sum(points[g]) / len(points[g]) for g in points]
            dashes = "-" if whose == "student" else "--"
            label = f"{whose}, {steps} step{'s' * (steps > 1)}, {evaluations} evaluation{'s' * (evaluations > 1)}"
            (line,) = axis.plot(list(points), means, dashes, marker=marker, ms=4, label=label)
            low, high = ([f(points[g]) for g in points] for f in (min, max))
            axis.fill_between(list(points), low, high, color=line.get_color(), alpha=0.15, lw=0)
        axis.set(
            xlabel="guidance g", ylabel=metric.replace("_", " "), yscale="log" if metric.startswith("fid") else "linear"
        )
        axis.grid(alpha=0.3, which="both")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize="small",
        frameon=False,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="evaluations of runs that differ in their seeds")
    parser.add_argument("--output", type=Path, default=Path("outputs", "guidance.png"))
    parser.add_argument("--steps", nargs="*", type=int, help="only these step counts")
    options = parser.parse_args()
    try:
        found = curves(options.files)
    except UserError as error:
        sys.exit(f"error: {error}")
    found = {key: metrics for key, metrics in found.items() if not options.steps or key[1] in options.steps}
    save(draw(found), options.output)
    print("\n".join(tables(found)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
