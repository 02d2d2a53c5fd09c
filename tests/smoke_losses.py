"""The losses of a run, update by update, from what logger=csv wrote.

`python tests/smoke_losses.py outputs/smoke` records those of a finished `distill.py experiment=smoke` to tests/data/.
"""

import csv
import json
import sys
from pathlib import Path

RECORDED = Path(__file__).parent / "data" / "smoke_losses.json"


def read_losses(run: Path) -> dict[str, list[float]]:
    """Stage -> its losses in the order of updates, restarts included."""
    losses: dict[str, dict[int, float]] = {}
    for file in sorted((run / "csv").glob("version_*/metrics.csv")):
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                for key, value in row.items():
                    if key.endswith("/loss") and value:
                        losses.setdefault(key.removesuffix("/loss"), {})[int(row["step"])] = float(value)
    return {stage: [value for _, value in sorted(values.items())] for stage, values in losses.items()}


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(read_losses(Path(sys.argv[1])), indent=1) + "\n")
