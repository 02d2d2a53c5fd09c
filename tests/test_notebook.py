"""docs/quickstart.ipynb: twenty lines of the Python API, which run as they stand; what its stored outputs show."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
LINE = re.compile(r"^(\d+) steps: fid_classifier ([\d.]+), teacher ([\d.]+)$", re.M)


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(cells: Any) -> list[Any]:
    return [cell for cell in cells if cell.cell_type == "code"]


def shown(cells: Any) -> tuple[list[Image.Image], dict[int, tuple[float, float]]]:
    """The pictures of all outputs, and the printed metrics by step count: of the model, of the teacher."""
    outputs = [output for cell in code(cells) for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    metrics = {int(steps): (float(model), float(teacher)) for steps, model, teacher in LINE.findall(printed)}
    return [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures], metrics


@pytest.fixture
def executed(tmp_path, workplace, monkeypatch):
    """executed() -> the notebook's cells after a run; with a text, that in the place of its settings."""
    monkeypatch.setenv("PDISTILL_CACHE", str(workplace / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))

    def executed(settings: str | None = None) -> Any:
        book = notebook()
        (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source = settings or cell.source
        NotebookClient(book, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return book.cells

    return executed


def test_it_runs(executed, tmp_path):
    cells = executed("updates, plan, num_samples = 6, [4, 2, 1], 50")
    (picture,), metrics = shown(cells)
    assert picture.size == (12 * 50 + 2, 3 * 50 + 2) and list(metrics) == [4, 2, 1]
    assert metrics[4][0] == metrics[4][1] and metrics[1][0] != metrics[1][1]  # the first is the teacher itself
    stages = {path.parent.name for path in (tmp_path / "outputs" / "quickstart").glob("*/denoiser")}
    assert stages == {"teacher", "steps-0002", "steps-0001"}


def test_twenty_lines_and_what_they_showed():
    cells = notebook().cells
    lines = [line for cell in code(cells) for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 20 and all(cell.outputs == [] or cell.execution_count for cell in code(cells))
    (picture,), metrics = shown(cells)
    assert picture.size == (12 * 50 + 2, 4 * 50 + 2) and list(metrics) == [8, 4, 2, 1]
    assert NOTEBOOK.stat().st_size < 200_000 and "Traceback" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_it_shows_what_is_stored(executed):
    """As it stands: students beat their teacher at its few steps, and the metrics are those of the stored outputs."""
    (_, stored), (_, metrics) = shown(notebook().cells), shown(executed())
    for steps in (2, 1):
        assert metrics[steps][0] < 0.7 * metrics[steps][1]
    for steps, (model, teacher) in stored.items():
        assert metrics[steps] == (pytest.approx(model, rel=0.3), pytest.approx(teacher, rel=0.3))
