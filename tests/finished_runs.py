"""Run directories as a finished run leaves them, without the run: of version 0.1.0, or of today."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

CONFIG = Path(__file__).parent / "data" / "run_0_1_0.yaml"  # `distill.py experiment=smoke` by version 0.1.0
GRID = 8 * 50 + 2


class UNMEASURED:
    """In place of a value: nothing was measured. A class, because its name is the same in every worker."""


def make_run(
    name: str,
    values: dict[str, Any],
    changed: dict[str, Any] | None = None,
    *,
    made: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    row: dict[str, Any] | None = None,
    ancestral: float | None = None,
    root: Path = Path("outputs"),
) -> Path:
    """outputs/<name> with `values` of fid_classifier by stage ("teacher", "steps-0002"; UNMEASURED for metrics=none).

    `changed` are dotted keys of the configuration, `made` is run.json (none: version 0.1.0), `row` joins every stage's
    row, and `ancestral` is the teacher's value by that sampler.
    """
    directory = root / name
    rows = []
    for stage, value in values.items():
        num_steps = 8 if stage == "teacher" else int(stage.split("-")[1])
        of_stage = {"stage": stage, "num_steps": num_steps, "seconds_per_image": 0.0002 * num_steps, "updates": 15}
        of_stage |= {"parent": None, "denoiser": f"{stage}/denoiser", "training_images": 480}
        of_stage |= {"training_seconds": 1.5, "joules": None}
        if value is not UNMEASURED:
            of_stage |= {"fid_classifier": value, "num_samples": 200, "provenance": _provenance(num_steps, provenance)}
        rows.append(of_stage | (row or {}))
        (directory / stage / "denoiser").mkdir(parents=True)
        Image.new("L", (GRID, GRID), 30 * len(rows)).save(directory / stage / "samples.png")
        (directory / stage / "metrics.json").write_text(json.dumps(rows[-1]))
    config = OmegaConf.load(CONFIG)
    for key, new in ({"name": name} | (changed or {})).items():
        OmegaConf.update(config, key, new, force_add=True, merge=not isinstance(new, dict))
    OmegaConf.save(config, directory / "config.yaml")
    (directory / "summary.json").write_text(json.dumps(rows))
    points = {"ddim": {"1": 50.0, "8": values["teacher"]}} if values["teacher"] is not UNMEASURED else {}
    points |= {"ancestral": {"8": ancestral}} if ancestral else {}
    (directory / "teacher" / "curve.json").write_text(json.dumps(points))
    if made is not None:
        (directory / "run.json").write_text(json.dumps(made))
    return directory


def _provenance(num_steps: int, changed: dict[str, Any] | None) -> dict[str, Any]:
    made_with = {"extractor": "classifier", "extractor_fingerprint": "e1", "reference": "digits"}
    made_with |= {"reference_fingerprint": "r1", "reference_size": 1797, "num_samples": 200, "sampler": "ddim"}
    made_with |= {"num_steps": num_steps, "clip": True, "seed": 0, "precision": "float32", "version": "0.1.0"}
    return made_with | (changed or {})


def evaluated(directory: Path, label: str, num_steps: int | None, value: float, **provenance: Any) -> dict[str, Any]:
    """A row as evaluate.py of version 0.1.0 writes it; `provenance` is added or changed."""
    made_with = _provenance(num_steps or 0, {"num_steps": num_steps, "label": label})  # type: ignore[dict-item]
    stage = "teacher" if label.startswith("teacher") else f"steps-{num_steps or 0:04d}"
    made_with |= {"denoiser": None if num_steps is None else str(directory / stage / "denoiser")}
    made_with |= {"intervals": {"bootstrap": 20, "extrapolate": False}}
    row = {"fid_classifier": value, "fid_classifier_std": 0.1, "recall": 0.5, "seconds": 1.0}
    return row | {"provenance": made_with | provenance}


def write_evaluation(directory: Path, rows: list[dict[str, Any]]) -> None:
    file = directory.parent / "evaluations" / f"{directory.name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows))
