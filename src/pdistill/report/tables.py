"""Rows of figures with their provenance: which may stand side by side, as a table, as curves.

A row is what evaluate.py writes: metrics, `<metric>_std`, and under "provenance" what they were measured with.
"""

from pdistill.report.plots import Curves

REAL = "real images"  # the label of the row that compares two halves of the reference
# Parts of a figure's provenance that must be equal for two figures to be compared.
MATTERS = ("extractor", "extractor_fingerprint", "reference_fingerprint", "num_samples", "clip", "precision")


def comparable(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """What makes two figures no comparison, by their provenances, as "key theirs, there ours"; empty if nothing."""
    return [f"{k} {theirs.get(k)}, there {ours.get(k)}" for k in MATTERS if ours.get(k) != theirs.get(k)]


def _metrics(rows: list[dict]) -> list[str]:
    keys = dict.fromkeys(k for row in rows for k in row if not k.endswith("_std"))
    return [k for k in keys if k not in ("provenance", "seconds")]


def cells(rows: list[dict]) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, rows in words and notes; rows that are no comparison with the first sampled one carry a mark."""
    metrics = _metrics(rows)
    sampled = [row["provenance"] for row in rows if row["provenance"]["num_steps"]]
    lines, notes = [], {}
    for row in sorted(rows, key=lambda row: row["provenance"]["label"] == REAL):
        made_with = row["provenance"]
        other = comparable(sampled[0], made_with) if sampled and made_with["label"] != REAL else []
        if other:
            notes.setdefault("; ".join(other), "†" * (len(notes) + 1))
        mark = notes.get("; ".join(other), "")
        figures = [
            "" if row.get(m) is None else f"{row[m]:.4g}" + (f" ± {row[f'{m}_std']:.2g}" if row.get(f"{m}_std") else "")
            for m in metrics
        ]
        steps = str(made_with["num_steps"] or "")
        lines.append([made_with["label"] + mark, steps, str(made_with["num_samples"]), *figures])
    return (
        ["samples of", "steps", "number", *metrics],
        lines,
        [f"{mark} measured otherwise: {n}" for n, mark in notes.items()],
    )


def curves(rows: list[dict]) -> tuple[str | None, Curves]:
    """The name of the FID, and its values, of the rows that are a comparison with the first sampled one."""
    sampled = [row for row in rows if row["provenance"]["num_steps"]]
    if not sampled:
        return None, {}
    metric, found = next(k for k in sampled[0] if k.startswith("fid")), {}
    for row in sampled:
        made_with = row["provenance"]
        if metric in row and not comparable(sampled[0]["provenance"], made_with):
            spread = row.get(f"{metric}_std") or 0.0
            values = [row[metric] - spread, row[metric], row[metric] + spread] if spread else [row[metric]]
            found.setdefault(made_with["label"], {})[made_with["num_steps"]] = values
    return metric, found
