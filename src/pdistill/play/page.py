"""The page of `pdistill play`: controls, and a line of pictures for each denoiser. The one module that knows Gradio."""

import html
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; nothing is to leave this machine
import gradio as gr

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.play.drawing import BETWEEN, MOST_IMAGES, PICTURES, STEPS, VIEWS, Strip, Wish
from pdistill.play.lineup import Lineup
from pdistill.play.turns import News, Turns
from pdistill.sampling import samplers

T = TypeVar("T", int, float)

OWN = "each its own"
IN_TURN = "each in turn"
PER_LINE, PER_NARROW_LINE = 8, 4  # pictures, where there is room and on a telephone
STYLE = Path(__file__).with_name("page.css")
# A stamp that grows with each event of this page comes first among what is sent: see `turns`.
NOW = "(stamp, seed, ...rest) => [performance.now(), seed, ...rest]"
SURPRISE = "(stamp, seed, ...rest) => [performance.now(), Math.floor(Math.random() * 2 ** 31), ...rest]"
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Facts:
    """What decides which controls there are: those of the denoiser that was loaded first."""

    num_classes: int | None
    prompts: list[str] | None
    """That it keeps; None for a denoiser without words."""
    guided: bool
    ranges: list[tuple[float, float]]

    @classmethod
    def of(cls, denoiser: Denoiser, lineup: Lineup) -> "Facts":
        ranges = lineup.taught_guidance
        prompts = None if denoiser.codec is None else denoiser.codec.prompts
        return cls(denoiser.num_classes, prompts, denoiser.has_null_condition or bool(ranges), ranges)


def page_of(lineup: Lineup, facts: Facts, notes: Sequence[str] = ()) -> gr.Blocks:
    """The page, to be launched; `notes` are lines on its top."""
    turns = Turns(lineup)
    names = [player.name for player in lineup.players]
    with gr.Blocks(title=f"pdistill play: {lineup.name}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_heading(lineup.name, notes), apply_default_css=False)
        stamp = gr.Number(0, visible="hidden", label="stamp")
        with gr.Row(elem_classes="first", equal_height=True):
            view = gr.Radio(list(VIEWS), value=PICTURES, show_label=False, label="Show", min_width=300, scale=3)
            surprise = gr.Button("Surprise me", variant="primary", size="lg", min_width=120, scale=1)
            again = gr.Button("Draw", size="lg", min_width=120, scale=1)
        with gr.Row(elem_classes="page"):
            with gr.Column(scale=1, min_width=280, elem_classes="controls"):
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                second = gr.Number(1, label="Second seed", precision=0, visible=False)
                count = gr.Slider(1, MOST_IMAGES, value=8, step=1, label="Number of pictures")
                picture = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Which picture", visible=False)
                num_steps = gr.Textbox("", label="Steps", placeholder=OWN)
                sampler = gr.Dropdown([OWN, *samplers()], value=OWN, label="Sampler")
                labels = [IN_TURN, *map(str, range(facts.num_classes or 0))]
                label = gr.Dropdown(labels, value=IN_TURN, label="Label", visible=facts.num_classes is not None)
                guided: dict[str, Any] = {"info": _about(facts.ranges), "visible": facts.guided}
                guidance = gr.Textbox("", label="Guidance", placeholder=OWN, **guided)
                worded: dict[str, Any] = {"info": _of_prompts(facts.prompts), "visible": facts.prompts is not None}
                prompt = gr.Textbox("", label="Prompt", **worded)
                numbered = [(name, str(k)) for k, name in enumerate(names)]
                everyone = [number for _, number in numbered]
                chosen = gr.CheckboxGroup(numbered, value=everyone, label="Denoisers", visible=len(names) > 1)
            with gr.Column(scale=3, min_width=300, elem_classes="pictures"):
                status = gr.HTML("", elem_id="status", apply_default_css=False)
                lines = [gr.HTML("", elem_id=f"line-{k}", apply_default_css=False) for k in range(len(names))]
        controls = [stamp, seed, view, second, count, picture, num_steps, sampler, label, guidance, prompt, chosen]

        def draw(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
            yield from drawn(turns, str(request.session_hash), values)

        def draw_another(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
            for shown in drawn(turns, str(request.session_hash), values):
                yield values[1], *shown  # the seed that the browser drew

        how: dict[str, Any] = {
            "inputs": controls,
            "trigger_mode": "multiple",  # a newer click does not wait for an older: `turns` ends that
            "concurrency_limit": None,
            "preprocess": False,  # what cannot be is told by `wish_of`, in a line
            **QUIET,
        }
        live = (seed, view, second, count, picture, sampler, label, chosen)
        changes = [*(control.input for control in live), num_steps.change, guidance.change, prompt.submit]
        gr.on([page.load, again.click, *changes], draw, js=NOW, outputs=[status, *lines], **how)
        surprise.click(draw_another, js=SURPRISE, outputs=[seed, status, *lines], **how)
        view.input(_which, view, [second, count, picture], queue=False, **QUIET)
    return page


def _which(view: str) -> list[Any]:
    """Which controls a view has of its own."""
    return [gr.update(visible=on) for on in (view == BETWEEN, view != STEPS, view == STEPS)]


def drawn(turns: Turns, visitor: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Values for the status and the lines; `values` are those of the controls. What is wrong becomes a line."""
    stamp, seed, *others, chosen = values
    players = turns.lineup.players
    kept: list[Any] = [gr.skip()] * len(players)
    try:
        wish, lines = wish_of(seed, *others), _chosen(chosen, len(players))
    except UserError as error:
        list(turns.drawn(visitor, stamp, Wish(), ()))  # what is in work is of no interest any more
        yield _problem(str(error)), *kept
        return
    first = True
    for news in turns.drawn(visitor, stamp, wish, lines):
        shown = [gr.skip() if k in lines or not first else "" for k in range(len(players))]
        if news.line is not None:
            shown[news.line] = markup(players[news.line].name, news)
        yield html.escape(news.status), *shown
        if news.is_last:
            yield _finished(wish), *kept
        first = False


def wish_of(seed: Any, view: Any, second: Any, count: Any, picture: Any, *others: Any) -> Wish:
    """What the controls say, as the browser sent it. Raises UserError for what cannot be."""
    num_steps, sampler, label, guidance, prompt = others
    return Wish(
        view=view,
        seed=_whole(seed),
        second_seed=_whole(second),
        num_images=_whole(count),
        picture=_whole(picture),
        num_steps=_read(num_steps, int, "steps must be a whole number, or empty"),
        sampler=None if sampler in (OWN, None) else str(sampler),
        label=None if label == IN_TURN else _read(label, int, "label must be the number of a class"),
        guidance=_read(guidance, float, "guidance must be a number, or empty"),
        prompt=str(prompt or "").strip() or None,
    )


def _whole(value: Any) -> Any:
    """3.0, as browsers send whole numbers, as 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read(text: Any, kind: Callable[[str], T], must: str) -> T | None:
    """The number that a text says; None for an empty one."""
    text = "" if text is None else str(text).strip()
    try:
        return kind(text) if text else None
    except ValueError as error:
        raise UserError(f"{must}, not {text[:50]!r}") from error


def _chosen(chosen: Any, count: int) -> list[int]:
    """Numbers of players. Raises UserError where none is chosen."""
    lines = [k for k in range(count) if str(k) in chosen] if count > 1 and isinstance(chosen, list) else [0]
    if not lines:
        raise UserError("no denoiser is ticked: tick one below Denoisers")
    return lines


def _about(ranges: list[tuple[float, float]]) -> str:
    taught = ", ".join(f"{low:g} to {high:g}" if low < high else f"{low:g}" for low, high in dict.fromkeys(ranges))
    return "1 is plain" + (f"; taught: {taught}" if taught else "")


def _of_prompts(prompts: list[str] | None) -> str:
    return "Enter draws; empty: those that it was distilled with" if prompts else "what to draw; Enter draws it"


def _finished(wish: Wish) -> str:
    what = {
        PICTURES: f"{wish.num_images} pictures of seed {wish.seed}",
        STEPS: f"picture {wish.picture} of seed {wish.seed}: x_hat after every step",
        BETWEEN: f"from picture 1 of seed {wish.seed} to that of seed {wish.second_seed}",
    }
    return f"{what[wish.view]}. Click on a picture to save it; its settings are inside."


def _heading(name: str, notes: Sequence[str]) -> str:
    lines = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes)
    return f"<h1>pdistill play <code>{html.escape(name)}</code></h1>{lines}"


def _problem(text: str) -> str:
    return f"<p class='problem' role='alert'>{html.escape(text)}</p>"


def markup(name: str, news: News) -> str:
    """A line of the page: a denoiser's name, what it took, and its pictures, each a link that saves it."""
    if news.strip is None:
        return f"<section><h2>{html.escape(name)}</h2>{_problem(news.problem)}</section>"
    strip, setting = news.strip, news.strip.settings[0]
    each = "" if setting["view"] == STEPS else f"{1000 * strip.seconds / len(strip.images):.3g} ms each"
    steps = "" if f"{setting['num_steps']} step" in name else f"sampled in {_steps(setting['num_steps'])}"
    facts = ", ".join(filter(None, [steps, setting["sampler"], f"{strip.seconds:.3g} s", each, strip.note]))
    pictures = "".join(_picture(name, strip, k) for k in range(len(strip.images)))
    pixelated = " pixelated" if strip.images.shape[-1] < 128 else ""
    count = PER_LINE if setting["view"] == STEPS else len(strip.images)  # of every line, so that pictures are alike
    columns = [min(most, count) for most in (PER_LINE, PER_NARROW_LINE)]
    return (
        f"<section><h2>{html.escape(name)}</h2> <span class='facts'>{html.escape(facts)}</span>"
        f"<div class='strip{pixelated}' style='--wide: {columns[0]}; --narrow: {columns[1]}'>{pictures}</div></section>"
    )


def _picture(name: str, strip: Strip, k: int) -> str:
    setting, caption = strip.settings[k], html.escape(strip.captions[k])
    told = html.escape(f"{name}, {caption or setting['picture']}, seed {setting['seed']}", quote=True)
    file = "-".join(filter(None, [*name.replace(",", "").split(), f"seed-{setting['seed']}", f"{k + 1:02d}"]))
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f"<figure><a download='{html.escape(file, quote=True)}.png' href='{strip.address(k)}' "
        f"title='save this picture: its settings are inside'><img src='{strip.address(k)}' alt='{told}'></a>{below}"
        f"</figure>"
    )


def _steps(num_steps: int) -> str:
    return f"{num_steps} step" + "s" * (num_steps > 1)


def theme() -> gr.themes.Base:
    """Gradio's base with the system's fonts, none of which is fetched, and small print that can be read."""
    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return plain.set(
        button_primary_background_fill="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )
