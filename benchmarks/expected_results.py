"""What every experiment of conf/experiment gave here, or that it was not run, and the paper's scores beside it.

    python benchmarks/expected_results.py

writes docs/expected_results.md from docs/expected_results.json, where whoever runs an experiment puts its results:
`command`, `metric`, and, once it was run, `date` and `machine`; of each row `what`, `ours` with its `spread` (a
standard deviation), and `paper` as it is printed there. A test fails where the page is another than the file gives, and
where an experiment is missing.
"""

import sys
from pathlib import Path
from typing import Any

from pdistill.errors import UserError
from pdistill.files import read_json, write_text
from pdistill.report.rounding import with_spread
from pdistill.report.tables import filled, markdown

DOCS = Path(__file__).parents[1] / "docs"
SOURCE, PAGE = DOCS / "expected_results.json", DOCS / "expected_results.md"
NOT_RUN = "not run"
HEAD = """# Expected results

Every experiment of `conf/experiment/`: what it gave here, by which command, when and where, or that it was not run; and
the paper's scores beside it. Lower is better in all tables. ± is the standard deviation over seeds.
[results.md](results.md) tells what was learned from them, [metrics.md](metrics.md) what may be compared with what.

*Written by `python benchmarks/expected_results.py` from `docs/expected_results.json`: change that file.*
"""


def page(experiments: dict[str, dict[str, Any]]) -> str:
    """The text of docs/expected_results.md."""
    return "\n".join([HEAD, *(section(name, told) for name, told in experiments.items())])


def section(name: str, told: dict[str, Any]) -> str:
    """One experiment. Raises UserError where its results do not say where and when they were measured."""
    rows = told["rows"]
    if any("ours" in row for row in rows) and not (told.get("date") and told.get("machine")):
        raise UserError(f"{SOURCE.name}: {name} has results without their date and machine: add both")
    measured = f"Measured: {told['date']}, {told['machine']}." if told.get("date") else "Not run."
    facts = [measured, f"Ours: {told['metric']}."]
    facts += [f"The paper's: {told['paper_metric']}."] if told.get("paper_metric") else []
    facts += [told["note"]] if told.get("note") else []
    lines = [[row["what"], _ours(row), row.get("paper", "")] for row in rows]
    table = [*markdown(*filled([name, "ours", "paper"], lines)), ""] if rows else []
    return "\n".join([f"## {name}", "", "```", told["command"], "```", "", *_wrapped(" ".join(facts)), "", *table])


def _ours(row: dict[str, Any]) -> str:
    return with_spread(row["ours"], row.get("spread")) if "ours" in row else NOT_RUN


def _wrapped(text: str, width: int = 120) -> list[str]:
    lines = [""]
    for word in text.split():
        fits = len(lines[-1]) + len(word) < width
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if fits else [*lines, word]
    return lines


def main() -> None:
    try:
        write_text(PAGE, page(read_json(SOURCE)))
    except (UserError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"error: {SOURCE} is no object of experiments with command, metric and rows ({error!r})")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
