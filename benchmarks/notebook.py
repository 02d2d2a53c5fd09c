"""Runs docs/quickstart.ipynb and keeps its outputs in it, without progress bars: `python benchmarks/notebook.py`."""

import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


def main() -> None:
    book, start = nbformat.read(NOTEBOOK, as_version=4), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        NotebookClient(book, timeout=900, record_timing=False, resources={"metadata": {"path": place}}).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            _join(cell.outputs)
    nbformat.write(book, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {time.monotonic() - start:.0f} s")


def _join(outputs: list) -> None:
    """Makes one of the printed lines between which bars stood."""
    for k in range(len(outputs) - 1, 0, -1):
        if outputs[k].get("name") == outputs[k - 1].get("name") == "stdout":
            outputs[k - 1].text += outputs.pop(k).text


if __name__ == "__main__":
    main()
