"""The denoiser that a configuration describes, and whether a given one, or a schedule, goes with it."""

from pathlib import Path

import torch
from hydra.utils import instantiate

from pdistill import network as networks
from pdistill.commands.identity import is_imported
from pdistill.commands.settings import Distill, Train
from pdistill.commands.teachers import check_data, predicting
from pdistill.dataset import ImageSet
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.heads import Heads
from pdistill.parameterization import V
from pdistill.randomness import seed_of

NEARLY_ZERO_SNR = -10.0  # terminal log-SNR below which x_hat = (z - sigma eps) / alpha is not distilled


def new_denoiser(settings: Train, data: ImageSet) -> Denoiser:
    """An untrained denoiser of the configured kind that fits the data; its weights depend on the seed alone."""
    parameterization, schedule = instantiate(settings.parameterization), instantiate(settings.schedule)
    channels, height, width = data.image_shape
    if settings.conditional and data.labels is None:
        raise UserError(f"conditional=true needs labels, and {data.name} has none: one sub-folder for each class")
    num_classes = data.num_classes if settings.conditional else None
    torch.manual_seed(seed_of("network", settings.seed))
    part = instantiate(settings.network)
    if not isinstance(part, torch.nn.Module):
        part = networks.build(
            part,
            image_size=height,
            image_channels=channels,
            out_channels=parameterization.channels(channels),
            num_classes=None if num_classes is None else num_classes + bool(settings.label_dropout),
        )
    null_label = num_classes if settings.label_dropout else None
    denoiser = Denoiser(part, parameterization, schedule, null_label=null_label, image_shape=(channels, height, width))
    denoiser.check_storable()
    if settings.start is not None:
        start = Denoiser.load(Path(settings.start).expanduser())
        _refuse_differences(f"start={settings.start}", denoiser, start)
        denoiser.load_state_dict(start.state_dict())
    return denoiser


def new_student(settings: Distill, data: ImageSet, given: Denoiser | None) -> Denoiser:
    """What students are to be like: as configured, or, with a diffusers teacher, that in the asked parameterization.

    It differs from a given teacher, if it does, in the parameterization alone. Raises UserError for other differences.
    """
    if given is None:
        return new_denoiser(settings, data)
    parameterization = instantiate(settings.parameterization)
    if is_imported(settings.teacher):
        check_data(settings, given, data)
        return predicting(given, parameterization)
    if given.codec is not None:
        check_data(settings, given, data)
        check_step_count(settings, given)
        converts = given.num_steps is None and not given.parameterization.stable_at_zero_snr
        return predicting(given, V()) if converts else given
    if isinstance(given.parameterization, Heads) or given.guidance is not None:  # which no configuration names
        check_step_count(settings, given)
        if settings.start is not None:
            start = Denoiser.load(Path(settings.start).expanduser())
            _refuse_differences(f"start={settings.start}", given, start)
        return given
    template = new_denoiser(settings, data)
    unstable = given.parameterization.name != parameterization.name and not given.parameterization.stable_at_zero_snr
    like_it = predicting(given, parameterization) if unstable and given.num_steps is None else given
    check_same(settings, template, like_it)
    check_step_count(settings, given)
    return template


def check_stable(settings: Train, denoiser: Denoiser, floor: float) -> None:
    """Refuses a parameterization that divides by alpha where log-SNR ends at `floor` or below."""
    terminal = denoiser.schedule(torch.ones(1, dtype=torch.float64))
    stable = getattr(denoiser.parameterization, "stable_at_zero_snr", True)
    if settings.allow_unstable or stable or terminal > floor:
        return
    alpha = float(denoiser.schedule.alpha_sigma(terminal)[0])
    done = "distilled" if isinstance(settings, Distill) else "trained"
    raise UserError(
        f"parameterization={denoiser.parameterization.name} cannot be {done} with a schedule that ends at log-SNR "
        f"{float(terminal):g}: x_hat = (z - sigma eps) / alpha divides by alpha = {alpha:.2g}. Use parameterization=x, "
        f"x_eps or v, or allow_unstable=true to try all the same"
    )


def check_same(settings: Distill, template: Denoiser, teacher: Denoiser) -> None:
    """A given denoiser that is what the configuration says."""
    _refuse_differences(f"teacher={settings.teacher}", template, teacher)


def check_step_count(settings: Distill, teacher: Denoiser) -> None:
    """A given denoiser that the plan goes on from."""
    if teacher.num_steps is not None and teacher.num_steps != settings.steps.plan[0]:
        raise UserError(
            f"teacher={settings.teacher} was distilled for {teacher.num_steps} steps, and steps.plan starts at "
            f"{settings.steps.plan[0]}: start the plan at {teacher.num_steps}"
        )


def check_guidance(denoiser: Denoiser, guidance: float, given: str, place: str) -> None:
    """Raises UserError where the denoiser, which lies at `place`, cannot take this guidance; `given` is what was typed.

    As `sample` would, but before any work.
    """
    if denoiser.guidance is not None:
        low, high = denoiser.guidance
        if not low <= guidance <= high:
            cure = f"guidance {low:g} alone" if low == high else f"guidance from {low:g} to {high:g}"
            raise UserError(f"{given}: {place} was taught {cure}: give that, or leave it out")
    elif denoiser.num_classes is None and denoiser.codec is None:
        raise UserError(f"{given}: {place} is not class-conditional: leave it out")
    elif guidance != 1 and not denoiser.has_null_condition:
        raise UserError(f"{given}: {place} does not know what no label means: it must be trained with label_dropout")


def _refuse_differences(what: str, template: Denoiser, given: Denoiser) -> None:
    ours, theirs = template.architecture, given.architecture
    wrong = [
        f"{k} {theirs.get(k)!r}, configured {ours.get(k)!r}"
        for k in ("parameterization", "schedule", "null_label", "image_shape", "guidance")
        if ours.get(k) != theirs.get(k)
    ]
    wrong = [w.replace("{'name': ", "").replace("}", "") for w in wrong]
    keys = ours["network"].keys() | theirs["network"].keys()
    wrong += [
        f"network.{k} {theirs['network'].get(k)}, configured {ours['network'].get(k)}"
        for k in sorted(keys)
        if ours["network"].get(k) != theirs["network"].get(k)
    ]
    if wrong:
        raise UserError(
            f"{what} differs from the configuration: it has {'; '.join(wrong)}. Set conditional, "
            f"label_dropout and the groups parameterization, schedule, network and dataset to what it was trained with"
        )
