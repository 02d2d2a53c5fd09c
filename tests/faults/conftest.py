"""What the tests of faults share, and the count of faults at the end."""

import os
from collections.abc import Iterator

import pytest
import tally
from chains import Chain, Server, mounted


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("faults")
    (work / "logs").mkdir()
    os.environ["PDISTILL_FAULT_LOGS"] = str(work / "logs")
    server = Server(work / "cache")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="session")
def chain(server, tmp_path_factory) -> Chain:
    return Chain(server, tmp_path_factory.mktemp("chains"))


@pytest.fixture
def disk(tmp_path):
    """disk("size=1m") -> a context with a small disk of its own, as a directory."""
    return lambda options: mounted(tmp_path / "disk", options)


def pytest_terminal_summary(terminalreporter) -> None:
    for line in tally.lines():
        terminalreporter.write_line(f"faults: {line}")
