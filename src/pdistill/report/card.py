"""The model card of a denoiser: the README.md of a folder on the Hugging Face hub.

A metric stands on it where its provenance says that it was measured of these very weights, by their fingerprint.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader

from pdistill import __version__, registry
from pdistill.checks import is_count
from pdistill.denoiser import Denoiser
from pdistill.errors import printable
from pdistill.files import read_json
from pdistill.metrics.provenance import are_measured, evaluations
from pdistill.report import tables
from pdistill.report.choices import Config
from pdistill.report.rounding import with_spread
from pdistill.report.runs import KEY_OF_WEIGHTS, finite, metric_keys, rows_of, run_json
from pdistill.sampling import DDIM
from pdistill.storage import DEFAULT_GRID

MARK = "<!-- written by pdistill push -->"  # by which a folder is known as one that push may replace
TASK, TEXT_TASK = "unconditional-image-generation", "text-to-image"
FROM_THE_HUB = "diffusers:"  # begins the lineage of a teacher that diffusers made
HUB_DATASET = "pdistill.dataset.huggingface.load"
REQUIRED = ("extractor", "reference", "num_samples", "num_steps")  # of a provenance
NO_METRICS = ("provenance", "seconds")
NOT_ABOUT = ("denoiser", "label", "num_steps", "network_evaluations")  # of a provenance: said otherwise, or nowhere


@dataclass(frozen=True)
class Model:
    """The denoiser in `directory`; `run` is the run whose stage it is, `config` that run's configuration, if any."""

    denoiser: Denoiser
    directory: Path
    run: Path | None
    config: Config

    @property
    def stage(self) -> str:
        """Its name within the run, e.g. "steps-0004"."""
        return self.directory.resolve().parent.name

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, wherever they lie."""
        return self.denoiser.fingerprint

    @cached_property
    def rows(self) -> list[dict]:
        """The rows of the run's stages, without what was measured of weights that are no longer there or unknown."""
        return [] if self.run is None else [self._current(self.run, row) for row in rows_of(self.run)]

    def _current(self, run: Path, row: dict) -> dict:
        of_stage = run / row["stage"] / "denoiser" / "denoiser.json"
        here = self.fingerprint if row["stage"] == self.stage else _object(of_stage).get("fingerprint")
        measured = (row.get("provenance") or {}).get(KEY_OF_WEIGHTS)
        if measured and measured == (here or measured):
            return row
        return {k: v for k, v in row.items() if k not in ("provenance", "num_samples", *metric_keys([row]))}

    @property
    def num_steps(self) -> int:
        """The step count to sample with: a student's own, of a teacher that its pipeline was written for."""
        written_for = _object(self.directory / "denoiser.json").get("pipeline_steps")
        written_for = written_for if is_count(written_for) else None
        return self.denoiser.num_steps or written_for or DEFAULT_GRID

    @property
    def pictures(self) -> dict[str, Path]:
        """The pictures that belong into the folder, by their names there."""
        here = {"comparison.png": self.directory, "samples.png": self.directory}
        of_run = {} if self.run is None else {"comparison.png": self.run, "samples.png": self.run / self.stage}
        return {name: place / name for name, place in (here | of_run).items() if (place / name).is_file()}

    @property
    def base_model(self) -> str | None:
        """The hub id of the teacher, where lineage and configuration agree that it came from there."""
        given = self._on_hub(self.config.get("teacher"))
        ours = given is not None and "/" in given and self.denoiser.lineage[0] == FROM_THE_HUB + Path(given).name
        return given if ours else None

    @property
    def dataset(self) -> str | None:
        """The hub id of the run's dataset, where it came from there."""
        node = _node(self.config, "dataset")
        return self._on_hub(node.get("path")) if node.get("_target_") == HUB_DATASET else None

    def _on_hub(self, name: object) -> str | None:
        """The name if the hub could have it, and it is no folder, seen from here or from where the run was started."""
        if not isinstance(name, str) or self.run is None:
            return None
        try:
            validate_repo_id(name)
        except HFValidationError:
            return None
        there = [Path(name), self.run.resolve().parents[1] / name]
        return None if any(path.exists() for path in there) else name


def make(model: Model, repo_id: str, license: str | None = None) -> ModelCard:
    """The card of the model as `repo_id`; `license` is an identifier of the hub, e.g. "apache-2.0".

    Raises UserError where a file of the run or of its evaluation is damaged.
    """
    found = results(model)
    pipeline = _pipeline_class(model)
    index = {"model_name": repo_id.rpartition("/")[2], "eval_results": found} if found else {}
    related = {"base_model": model.base_model, "base_model_relation": "finetune"} if model.base_model else {}
    data = ModelCardData(
        library_name="pdistill" if pipeline is None else "diffusers",
        pipeline_tag=TASK if model.denoiser.codec is None else TEXT_TASK,
        license=license,
        tags=list(_tags(model, pipeline)),
        datasets=[model.dataset] if model.dataset else None,
        **related,
        **index,
    )
    environment = Environment(loader=PackageLoader("pdistill.report", "."), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": tables.plain, "quoted": json.dumps}
    body = environment.get_template("card.md.jinja").render(
        mark=MARK,
        repo_id=repo_id,
        model=model,
        denoiser=model.denoiser,
        facts=_facts(model),
        metrics="\n".join(tables.markdown(*_metrics(found))) if found else None,
        measured=_measured(found),
        own_extractors=sorted({str(r.metric_args["extractor"]) for r in found if r.metric_args} - {"inception"}),
        stages="\n".join(tables.markdown(*tables.stages(model.rows))) if model.rows else None,
        notes=tables.stage_notes(model.rows),
        pipeline=pipeline,
        code=_code(model, pipeline),
        guidance=_shown_guidance(model.denoiser),
        made=_made(model),
        version=__version__,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def results(model: Model) -> list[EvalResult]:
    """What was measured of these weights: by evaluate, and by the run what evaluate did not measure alike."""
    rows = [*_evaluated(model), *(row for row in model.rows if row["stage"] == model.stage)]
    found: dict[tuple, EvalResult] = {}
    for row in rows:
        made_with = row.get("provenance") or {}
        if made_with.get(KEY_OF_WEIGHTS) != model.fingerprint or not all(made_with.get(k) for k in REQUIRED):
            continue
        reference = str(made_with["reference"])
        about = {k: v for k, v in made_with.items() if v is not None and k not in NOT_ABOUT}
        guided = f", guidance {made_with['guidance']:g}" if "guidance" in made_with else ""
        alike = tuple(sorted((k, str(v)) for k, v in about.items() if k not in ("version", "intervals")))
        for key in _measured_keys(row):
            std = finite(row.get(f"{key}_std"))
            arguments = {"nfe": evaluations(made_with)} | ({} if std is None else {"std": std}) | about
            result = EvalResult(
                task_type=TASK,
                metric_type=key,
                metric_value=row[key],
                metric_name=f"{key}, {_steps(made_with['num_steps'])}{guided}, {made_with['num_samples']} samples",
                metric_args=arguments,
                **_reference(model, reference),
            )
            found.setdefault((key, made_with["num_steps"], alike), result)
    return list(found.values())


def _evaluated(model: Model) -> list[dict]:
    """The rows of evaluations of the run, and of this stage alone."""
    if model.run is None:
        return []
    folder = model.run.parent / "evaluations"
    name = model.run.resolve().name
    names = (name, f"{name}-{model.stage}")
    content = [read_json(folder / f"{name}.json", []) for name in names]
    return [row for rows in content if are_measured(rows) for row in rows]


def _measured_keys(row: dict) -> list[str]:
    """The names of the metrics in a row: of a stage, which also tells its cost, the FIDs."""
    if "stage" in row:
        return metric_keys([row])
    return [k for k, v in row.items() if not k.endswith("_std") and k not in NO_METRICS and finite(v) is not None]


def _reference(model: Model, reference: str) -> dict[str, Any]:
    """The images that were compared with: the run's dataset on the hub, or whatever has that name."""
    node = _node(model.config, "dataset")
    if model.dataset and reference == f"huggingface:{Path(model.dataset).name}":
        kept = {"dataset_config": "subset", "dataset_split": "split", "dataset_revision": "revision"}
        known = {theirs: str(node[ours]) for theirs, ours in kept.items() if node.get(ours)}
        return {"dataset_type": model.dataset, "dataset_name": reference} | known
    return {"dataset_type": re.sub(r"[^\w.-]+", "-", reference).strip("-") or "images", "dataset_name": reference}


def _node(config: Config, key: str) -> dict[str, Any]:
    """A group's node of a configuration; empty where it is none."""
    node = config.get(key)
    return node if isinstance(node, dict) else {}


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def _tags(model: Model, pipeline: str | list[str] | None) -> Iterator[str]:
    if pipeline is not None:
        yield "diffusers"
    yield "pdistill"
    if model.denoiser.num_steps is not None:
        yield from ("progressive-distillation", "few-step")
    if model.denoiser.num_classes is not None:
        yield "class-conditional"


def _pipeline_class(model: Model) -> str | list[str] | None:
    """What diffusers opens the directory with: its own class, [file, class] for one in the folder, None for nothing."""
    named = _object(model.directory / "model_index.json").get("_class_name")
    words = named if isinstance(named, list) and len(named) == 2 else [named]
    return named if all(isinstance(word, str) and word.isidentifier() for word in words) else None


def _code(model: Model, pipeline: str | list[str] | None) -> str | None:
    """The Python files of the folder that diffusers runs, in words; None where it needs none."""
    if not isinstance(pipeline, list):
        return None
    network = ["unet/guided.py"] if (model.directory / "unet" / "guided.py").is_file() else []
    return " and ".join(f"`{file}`" for file in (f"{pipeline[0]}.py", *network))


def _shown_guidance(denoiser: Denoiser) -> float | None:
    """A value for the lines to use it; None where the network takes none."""
    low, high = denoiser.guidance or (1.0, 1.0)
    return min(max(2.0, low), high) if denoiser.takes_guidance else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of a denoiser's directory; empty where there is none."""
    content = read_json(path, {}, cure="copy or train the denoiser again")
    return content if isinstance(content, dict) else {}


def _facts(model: Model) -> list[tuple[str, str]]:
    """What the model is, as lines of a table."""
    denoiser = model.denoiser
    channels, height, width = denoiser.pixel_shape
    lineage = [tables.plain(word) if isinstance(word, str) else _steps(word) for word in denoiser.lineage]
    facts = [
        ("images", f"{height}x{width}, {channels} channel{'s' * (channels > 1)}"),
        ("steps", str(denoiser.num_steps or f"any; the folder is written for {model.num_steps}")),
        ("the network predicts", tables.plain(_in_words("parameterization", denoiser.parameterization))),
        ("noise schedule", tables.plain(_in_words("schedule", denoiser.schedule))),
        ("lineage", " -> ".join(lineage)),
    ]
    if denoiser.sampler != DDIM:
        facts.append(("sampler", tables.plain(denoiser.sampler)))
    if denoiser.num_classes is not None:
        facts.append(("classes", str(denoiser.num_classes)))
    if denoiser.guidance is not None:
        low, high = denoiser.guidance
        kind = f"any from {low:g} to {high:g}, an input" if low < high else f"{low:g}, in the weights"
        facts.append(("guidance", f"{kind}; one evaluation a step"))
    if model.base_model:
        facts.append(("teacher", f"[{model.base_model}](https://huggingface.co/{model.base_model})"))
    if model.dataset:
        facts.append(("data", f"[{model.dataset}](https://huggingface.co/datasets/{model.dataset})"))
    return [*facts, ("fingerprint of the weights", f"`{model.fingerprint}`")]


def _in_words(group: str, part: Any) -> str:
    """A part's name, and the numbers and words that make it."""
    name = registry.name_of(group, type(part)) or type(part).__name__
    state = {k: v for k, v in registry.state_of(part).items() if isinstance(v, int | float | str)}
    return name + (f" ({', '.join(f'{k}={v}' for k, v in state.items())})" if state else "")


def _metrics(found: list[EvalResult]) -> tables.Words:
    """Metrics with what they are of."""
    lines = []
    guided = any("guidance" in (result.metric_args or {}) for result in found)
    for result in found:
        made_with = result.metric_args or {}
        value = with_spread(result.metric_value, made_with.get("std"))
        keys = ("nfe", *(["guidance"] if guided else []), "sampler", "num_samples", "extractor")
        columns = [made_with.get(k, "") for k in keys]
        of_reference = f"{result.dataset_name} ({made_with.get('reference_size', '?')} images)"
        lines.append([result.metric_type, value, *map(str, columns), of_reference])
    guidance = ["guidance"] if guided else []
    return ["metric", "value", "steps (NFE)", *guidance, "sampler", "samples", "features", "against"], lines


def _measured(found: list[EvalResult]) -> str:
    """How, in a sentence."""
    known = [{"version": "?", "precision": "?", "device": "?"} | (result.metric_args or {}) for result in found]
    return "; ".join(sorted({"version {version} in {precision} on {device}".format_map(way) for way in known}))


def _made(model: Model) -> dict[str, str]:
    """The version and the command of the run; empty without one."""
    facts = {} if model.run is None else run_json(model.run)
    if not facts:
        return {}
    command = "distill" if "teacher" in model.config else "train"
    overrides = facts.get("overrides")
    words = [_without_place(printable(word)) for word in (overrides if isinstance(overrides, list) else [])]
    return {
        "version": str(facts.get("version")),
        "command": shlex.join(["pdistill", command, *words]),
        "data": str(facts.get("data")),
    }


def _without_place(override: str) -> str:
    """key=/home/me/photos as key=photos: where files lie on somebody's machine is nobody's business."""
    key, equals, value = override.partition("=")
    return f"{key}={Path(value).name}" if equals and value.strip("'\"").startswith(("/", "~")) else override
