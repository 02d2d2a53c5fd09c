"""`pdistill play`: what is drawn, that the newest wish wins, what is refused, and the page in a browser."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from browser import started
from finished_runs import make_run
from forked import Command, free_port
from PIL import Image

from pdistill.commands import cli, play
from pdistill.errors import UserError
from pdistill.files import locked
from pdistill.generation import Draw, generate
from pdistill.play import drawing
from pdistill.play.drawing import BETWEEN, STEPS, Wish, between, draw
from pdistill.play.lineup import Lineup, Player, lineup_of
from pdistill.play.turns import Turns

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lineup(smoke) -> Lineup:
    return lineup_of(smoke, CPU)


def strip_of(lineup: Lineup, k: int, **wish) -> drawing.Strip:
    player = lineup.players[k]
    return draw(lineup.denoiser(player), player, Wish(**wish), lambda: None, lambda k, n: None)


# ---- what is drawn


def test_a_run_is_shown_by_its_stages_and_loads_late(smoke):
    lineup = lineup_of(smoke, CPU)
    assert [player.name for player in lineup.players] == ["teacher, 8 steps", "4 steps", "2 steps", "1 step"]
    assert not any(map(lineup.is_loaded, lineup.players))
    strip_of(lineup, 3)
    assert list(map(lineup.is_loaded, lineup.players)) == [False, False, False, True]
    (alone,) = lineup_of(smoke / "teacher", CPU).players
    assert (alone.name, alone.num_steps) == ("teacher, 8 steps", 8)


def test_pictures_are_those_of_sample_and_steps_lead_to_them(lineup):
    images = torch.cat(list(generate(lineup.denoiser(lineup.players[1]), range(3), Draw(4, seed=5))))
    pictures = strip_of(lineup, 1, seed=5, num_images=3)
    assert torch.equal(pictures.images, images) and pictures.seconds > 0
    steps = strip_of(lineup, 1, seed=5, picture=2, view=STEPS)
    assert steps.captions == ["t = 1", "t = 0.75", "t = 0.5", "t = 0.25"]
    assert torch.allclose(steps.images[-1], images[1], atol=1e-5) and not torch.allclose(steps.images[0], images[1])
    many = strip_of(lineup, 1, view=STEPS, num_steps=100)
    assert len(many.images) == 24 and many.captions[0] == "t = 1" and many.captions[-1] == "t = 0.01"
    assert many.note == "24 of its 100 steps are shown"
    arc = strip_of(lineup, 1, seed=5, second_seed=6, num_images=5, view=BETWEEN)
    ends = [strip_of(lineup, 1, seed=seed, num_images=1).images[0] for seed in (5, 6)]
    assert torch.allclose(arc.images[0], ends[0], atol=1e-5) and torch.allclose(arc.images[4], ends[1], atol=1e-5)


def test_the_arc_between_two_noises():
    first, last = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    arc = between(first, last, 5).flatten(1)
    assert torch.allclose(arc[0], first.flatten()) and torch.allclose(arc[-1], last.flatten(), atol=1e-6)
    angles = torch.arccos(torch.cosine_similarity(arc[1:], arc[:-1]))
    assert torch.allclose(angles, angles.mean().expand(4), rtol=0.05)  # equal steps
    assert arc[2].norm() > 0.95 * first.norm()  # a straight line would lose 0.29 of it
    assert torch.equal(between(first, first, 3)[1], first)


def test_a_saved_picture_says_how_to_draw_it_again(lineup, told, workplace):
    strip = strip_of(lineup, 2, seed=3, num_images=2, sampler="dpmsolver++2m", num_steps=3)
    picture = Image.open(io.BytesIO(strip.file(1)))
    settings = json.loads(picture.text["pdistill"])
    assert picture.size == (256, 256) and picture.text["Comment"] == settings["command"]
    assert (settings["seed"], settings["picture"], settings["num_steps"]) == (3, 2, 3)
    program, command, *words = shlex.split(settings["command"])
    assert (program, command) == ("pdistill", "sample")
    output = workplace / "again.png"
    assert told("sample.py", *words, f"output={output}", "individual=true")[0] == 0
    again = Image.open(output.with_suffix("") / "00001.png").convert("L")
    assert again.resize((256, 256), Image.Resampling.NEAREST).tobytes() == picture.tobytes()


def test_classes_guidance_heads_and_prompts(tiny, tmp_path):
    from test_text import write_teacher

    from pdistill import load_diffusers_teacher
    from pdistill.heads import grown
    from pdistill.method.guidance import Guidance
    from pdistill.training.settings import Steps

    teacher = tiny(num_classes=4)
    teacher.null_label = 3
    teacher.save(tmp_path / "labels")
    labels = lineup_of(tmp_path / "labels", CPU)
    strip = strip_of(labels, 0, num_steps=2, guidance=2.0)
    assert labels.players[0].name == "teacher, 32 steps" and strip.captions[:4] == [f"class {k}" for k in (0, 1, 2, 0)]
    assert not torch.equal(strip.images, strip_of(labels, 0, num_steps=2).images)
    assert strip_of(labels, 0, num_steps=1, label=2).settings[0]["label"] == 2
    with pytest.raises(UserError, match="label=3 must be of the classes 0 to 2"):
        strip_of(labels, 0, num_steps=1, label=3)

    method = Guidance(1, 5)
    method.begin(teacher, method.stages(Steps([8, 4], 1, 1))[0]).save(tmp_path / "guided")
    guided = lineup_of(tmp_path / "guided", CPU)
    assert guided.taught_guidance == [(1, 5)] and strip_of(guided, 0, num_steps=1, guidance=4.0).seconds
    with pytest.raises(UserError, match="guidance=9 must be from 1 to 5"):
        strip_of(guided, 0, num_steps=1, guidance=9.0)

    grown(tiny("x"), 8, [8, 4, 2, 1]).save(tmp_path / "several")
    several = lineup_of(tmp_path / "several", CPU)
    assert [player.name for player in several.players] == ["8 steps", "4 steps", "2 steps", "1 step"]
    assert len(strip_of(several, 1, view=STEPS).images) == 4
    with pytest.raises(UserError, match="this student knows 8, 4, 2, 1 steps, not 3"):
        strip_of(several, 0, num_steps=3)

    load_diffusers_teacher(str(write_teacher(tmp_path / "sd", "epsilon"))).save(tmp_path / "text")
    text = lineup_of(tmp_path / "text", CPU)
    strip = strip_of(text, 0, num_steps=2, num_images=1, prompt="one two", view=STEPS)
    assert strip.images.shape == (2, 1, 8, 8) and strip.settings[0]["prompt"] == "one two"
    with pytest.raises(UserError, match="give prompt="):
        strip_of(text, 0, num_steps=1)


# ---- who draws when


@pytest.fixture
def turns(tiny, tmp_path) -> Turns:
    for seed in (0, 1):
        tiny(seed=seed).save(tmp_path / f"denoiser-{seed}")
    players = [Player(f"{n} steps", tmp_path / f"denoiser-{k}", n) for k, n in enumerate((4000, 2))]
    return Turns(Lineup("two", players, CPU))


def test_the_newest_wish_wins(turns):
    """Twenty clicks of which each is 4,000 steps: the last one's pictures, and no work for the others."""
    begun, done = time.monotonic(), {}

    def click(stamp: int) -> None:
        steps = 3 if stamp == 20 else None
        done[stamp] = [n.line for n in turns.drawn("me", stamp, Wish(seed=stamp, num_steps=steps), [0, 1]) if n.strip]

    clicks = [threading.Thread(target=click, args=(stamp,)) for stamp in range(1, 21)]
    for thread in clicks:
        thread.start()
        time.sleep(0.05)
    for thread in clicks:
        thread.join(60)
    assert sorted(done[20]) == [0, 1] and not any(0 in done[k] for k in range(1, 20))
    assert time.monotonic() - begun < 60
    assert list(turns.drawn("me", 19, Wish(num_steps=1), [1])) == []  # came late
    assert [n.line for n in turns.drawn("you", 1, Wish(num_steps=1), [1]) if n.strip] == [1]


def test_a_visitor_who_left_keeps_nobody_waiting(turns):
    left = turns.drawn("left", 1, Wish(), [0])
    assert "step" in next(left).status or "loading" in turns.lineup.players[0].name
    left.close()
    assert [n.line for n in turns.drawn("stays", 1, Wish(num_steps=1), [0, 1]) if n.strip]


def test_what_goes_wrong_is_a_line(turns, monkeypatch, capsys):
    lost, fine = turns.lineup.players
    shutil.rmtree(lost.directory / "unet")
    problems = {n.line: n.problem for n in turns.drawn("me", 1, Wish(num_steps=1), [0, 1]) if n.line is not None}
    assert "is not a denoiser directory" in problems[0] and "\n" not in problems[0] and problems[1] == ""
    network = turns.lineup.denoiser(fine).network
    monkeypatch.setattr(network, "forward", lambda *a, **k: 1 / 0)
    (last,) = [n for n in turns.drawn("me", 2, Wish(num_steps=1), [1]) if n.line is not None]
    assert last.is_last and last.problem == "this cannot be drawn (ZeroDivisionError: division by zero)"
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ({"num_images": 17}, "number of pictures must be a whole number from 1 to 16, not 17"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": None}, "seed must be a whole number from 0"),
        ({"num_steps": 5000}, "steps must be a whole number from 1 to 4,096"),
        ({"guidance": float("nan")}, "guidance=nan must be a number"),
        ({"view": "?"}, "show must be one of pictures"),
    ],
)
def test_wishes_that_cannot_be(wish, complaint):
    with pytest.raises(UserError, match=complaint):
        Wish(**wish)


# ---- the command


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        play.main(list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_the_command_refuses(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    assert "nothing does not exist: give a run" in refused("nothing")
    assert f"{tmp_path} is neither a run nor a denoiser" in refused(str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(str(smoke), f"--port={port}").startswith(f"--port={port} of 127.0.0.1 is taken: give another")
    assert "--port=0 must be" in refused(str(smoke), "--port=0")
    assert "is no address of this machine" in refused(str(smoke), "--host=nowhere.invalid")
    run = make_run("begun", {"teacher": 4.0})
    shutil.rmtree(run / "teacher")
    with locked(Path("outputs/.begun.lock")):
        assert "is still being written and has no finished stage yet" in refused(str(run))
    assert "has no finished stage yet" in refused(str(run))
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: None)
    assert refused(str(smoke)) == "pdistill play needs Gradio: pip install 'pdistill[play]'"
    assert "play" in cli.PLAIN


def test_an_unfinished_run_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run("half", {"teacher": 4.0, "steps-0004": 5.0})
    assert play.notes_of(run) == []
    (run / "summary.json").unlink()
    assert play.notes_of(run)[0].startswith("This run was stopped before its end")
    with locked(Path("outputs/.half.lock")):
        assert play.notes_of(run)[0].startswith("This run is still being written: its finished stages are shown.")


# ---- the page


@contextlib.contextmanager
def browser_page(width: int = 1280):
    """A page of Chromium, and what it complained of: errors on its console, and requests to other hosts."""
    with started() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        page.set_default_timeout(45_000)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        ours = ("http://127.0.0.1:", "data:", "blob:")
        page.on("request", lambda sent: None if sent.url.startswith(ours) else complaints.append(sent.url))
        yield page, complaints


def finished(page, seed: int | str) -> None:
    page.locator("#status", has_text=f"of seed {seed}").wait_for()


def surprised(page) -> int:
    """The seed of the last of some clicks, when its pictures are there."""
    page.wait_for_timeout(1000)
    value = "document.querySelector('#seed input').value"
    page.wait_for_function(
        f"{value} != '0' && document.querySelector('#status').innerText.includes('of seed ' + {value} + '.')"
    )
    return int(page.get_by_label("Seed", exact=True).input_value())


def test_the_page_draws_and_surprises(smoke):
    settings = Namespace(host="127.0.0.1", port=free_port(), device="cpu", open=False)
    page_of_run = play.launched(settings, smoke, ["A note."])
    try:
        with browser_page(390) as (page, complaints):
            page.goto(page_of_run.local_url)
            finished(page, 0)
            assert page.locator(".strip img").count() == 4 * 8 and page.get_by_text("A note.").is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            for _ in range(20):
                page.get_by_role("button", name="Surprise me").click(no_wait_after=True)
            seed = surprised(page)
            with page.expect_download() as download:
                page.locator(".strip a").last.click()
            with Image.open(download.value.path()) as picture:
                saved = json.loads(picture.text["pdistill"])
            assert saved["seed"] == seed
            assert complaints == []
    finally:
        page_of_run.close(verbose=False)


@pytest.mark.slow
def test_everything_on_the_page(smoke, workplace):
    """The command itself, until Ctrl-C; every control of the page."""
    port = free_port()
    command = Command(
        "pdistill.commands.cli", "play", str(smoke), f"--port={port}", cwd=workplace, env=dict(os.environ)
    )
    try:
        with browser_page() as (page, complaints):
            for _ in range(240):
                assert command.poll() is None
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.5)
            page.goto(f"http://127.0.0.1:{port}")
            finished(page, 0)
            lines = page.locator("[id^=line-]")
            assert page.locator("section h2").all_inner_texts() == ["teacher, 8 steps", "4 steps", "2 steps", "1 step"]
            first = lines.nth(1).locator("img").first.get_attribute("src")

            page.get_by_label("Seed", exact=True).fill("7")
            finished(page, 7)
            assert lines.nth(1).locator("img").first.get_attribute("src") != first
            page.get_by_label("Seed", exact=True).fill("0")
            finished(page, 0)
            page.get_by_label("number input for Number of pictures").fill("3")
            page.locator("#status", has_text="3 pictures of seed 0").wait_for()
            assert page.locator(".strip img").count() == 4 * 3

            page.get_by_text("every step", exact=True).click()
            page.locator("#status", has_text="x_hat after every step").wait_for()
            assert lines.nth(0).locator("figcaption").all_inner_texts()[:2] == ["t = 1", "t = 0.875"]
            assert [lines.nth(k).locator("img").count() for k in range(4)] == [8, 4, 2, 1]
            page.get_by_label("number input for Which picture").fill("5")
            page.locator("#status", has_text="picture 5 of seed 0").wait_for()

            page.get_by_text("between two noises", exact=True).click()
            page.locator("#status", has_text="to that of seed 1").wait_for()
            page.get_by_label("Second seed").fill("9")
            page.locator("#status", has_text="to that of seed 9").wait_for()
            assert page.locator(".strip img").count() == 4 * 3

            page.get_by_text("pictures", exact=True).click()
            page.locator("#status", has_text="3 pictures").wait_for()
            page.get_by_label("Steps", exact=True).fill("3")
            lines.nth(0).get_by_text("sampled in 3 steps").wait_for()
            page.get_by_label("Steps", exact=True).fill("3 or 4")
            page.get_by_role("alert").get_by_text("steps must be a whole number, or empty, not '3 or 4'").wait_for()
            page.get_by_label("Steps", exact=True).fill("")
            page.locator("#status", has_text="3 pictures").wait_for()
            page.get_by_label("Sampler", exact=True).click()
            page.get_by_role("option", name="stochastic").click()
            lines.nth(1).get_by_role("alert").wait_for()
            assert "was distilled for the sampler ddim, not stochastic" in lines.nth(1).inner_text()
            assert lines.nth(0).locator("img").count() == 3  # the teacher takes any
            page.get_by_label("Sampler", exact=True).click()
            page.get_by_role("option", name="each its own").click()
            lines.nth(1).locator("img").first.wait_for()
            page.get_by_role("checkbox", name="teacher, 8 steps").uncheck()
            lines.nth(0).locator("img").first.wait_for(state="detached")
            assert page.locator(".strip img").count() == 3 * 3
            page.get_by_role("checkbox", name="teacher, 8 steps").check()
            lines.nth(0).locator("img").first.wait_for()

            page.get_by_label("Steps", exact=True).fill("4096")  # minutes of work
            page.locator("#status", has_text="of 4096").wait_for()
            page.get_by_label("Steps", exact=True).fill("1")
            lines.nth(0).get_by_text("sampled in 1 step").wait_for(timeout=15_000)
            page.get_by_label("Steps", exact=True).fill("")

            begun = time.monotonic()
            page.evaluate(
                "() => { for (let k = 0; k < 20; k++) setTimeout(() => [...document.querySelectorAll('button')]"
                ".find(b => b.innerText == 'Surprise me').click(), 50 * k); }"
            )
            surprised(page)
            assert time.monotonic() - begun < 60
            page.get_by_label("Seed", exact=True).fill("4")
            finished(page, 4)
            with page.expect_download() as download:
                lines.nth(2).locator("a").nth(1).click()
            assert download.value.suggested_filename == "2-steps-seed-4-02.png"
            with Image.open(download.value.path()) as picture:
                saved = json.loads(picture.text["pdistill"])
            assert (saved["seed"], saved["picture"], saved["num_steps"]) == (4, 2, 2)
            assert complaints == []
        command.send_signal(signal.SIGINT)
        done = command.finished(timeout=60)
    finally:
        command.kill()
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "stopped" and "Traceback" not in done.stderr
