"""`pdistill play outputs/demo`: a local page on which a teacher and its students draw side by side."""

import errno
import importlib.util
import os
import socket
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pdistill.commands.arguments import Parser, directory_of, without_imports
from pdistill.commands.status import is_finished, is_written
from pdistill.errors import Interrupted, UserError, first_line

if TYPE_CHECKING:
    from gradio import Blocks

FIRST_PORT = 7860
PORTS = 100  # that are tried where none is asked for
LOCAL = "127.0.0.1"


def main(arguments: list[str]) -> None:
    """Serves the page until it is stopped. Raises UserError, before anything is loaded, for what cannot be served."""
    parser = Parser(
        "pdistill play", description="A local page: teacher and students side by side, from the same noise."
    )
    parser.add_argument("path", help="a run, outputs/<name>, or a denoiser's directory")
    parser.add_argument("--port", type=int, help=f"default: the first that is free from {FIRST_PORT}")
    parser.add_argument("--host", default=LOCAL, help=f"default: {LOCAL}, which this machine alone can reach")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto (default): CUDA where there is one")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    settings = parser.parse_args(without_imports(arguments))
    if importlib.util.find_spec("gradio") is None:
        raise UserError("pdistill play needs Gradio: pip install 'pdistill[play]'")
    settings.port = free_port(settings.host, settings.port)
    path = directory_of(settings.path)
    notes = notes_of(path)
    page = launched(settings, path, notes)
    print(f"pdistill play: {page.local_url} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except Interrupted:
        print("stopped")
    finally:
        page.close(verbose=False)


def free_port(host: str, asked: int | None) -> int:
    """The port that was asked for, or one that is free. Raises UserError where there is none, or no such host."""
    if asked is not None and not 1 <= asked <= 65535:
        raise UserError(f"--port={asked} must be a whole number from 1 to 65535")
    error = OSError()
    for port in [asked] if asked is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as problem:
            raise UserError(f"--host={host} is no address of this machine ({first_line(problem)})") from problem
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(address)
                return port
            except OSError as problem:
                error = problem
    if asked is None:
        raise UserError(
            f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free on {host}: give --port"
        ) from error
    why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
    raise UserError(f"--port={asked} of {host} {why}: give another one, or leave it out") from error


def notes_of(path: Path) -> list[str]:
    """What the page says of an unfinished run. Raises UserError for one that is written and has nothing to show yet."""
    if not (path / "config.yaml").is_file():
        return []
    if is_written(path):
        if not (path / "teacher" / "metrics.json").exists():
            raise UserError(f"{path} is still being written and has no finished stage yet: see `pdistill status`")
        return ["This run is still being written: its finished stages are shown. Start again to see later ones."]
    if not is_finished(path):
        return ["This run was stopped before its end: its finished stages are shown."]
    return []


def launched(settings: Namespace, path: Path, notes: list[str]) -> "Blocks":
    """The page, served; one denoiser is loaded, which says what controls there are."""
    from pdistill.play.lineup import lineup_of
    from pdistill.processes import device_of

    lineup = lineup_of(path, device_of(settings.device))
    first = lineup.denoiser(lineup.players[-1])
    from pdistill.play.page import STYLE, Facts, page_of, theme  # Gradio, which takes seconds

    page = page_of(lineup, Facts.of(first, lineup), notes)
    for variable in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it is there
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), settings.host, "localhost", LOCAL]))
    page.launch(
        server_name=settings.host,
        server_port=settings.port,
        share=False,
        inbrowser=settings.open,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=theme(),
        css_paths=STYLE,
    )
    return page
