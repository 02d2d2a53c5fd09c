"""What is refused before any work starts: each check raises a UserError that says how to mend it."""

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.sampling import samplers
from pdistill.schedule import alpha_sigma

NEARLY_ZERO_SNR = -10.0  # terminal log-SNR below which x_hat = (z - sigma eps) / alpha is not distilled
COUNTS = (
    "training.updates",
    "training.batch_size",
    "distillation.batch_size",
    "distillation.max_teacher_steps",
    "steps.updates",
    "steps.updates_last_two",
    "checkpoint_every_n_updates",
    "max_batch_per_device",
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
)


def check_settings(cfg: DictConfig) -> None:
    """Numbers in their ranges, batches that divide among the devices, and a trainer that this machine can run."""
    at_least = dict.fromkeys(COUNTS, 1) | {"seed": 0, "num_workers": 0, "training.warmup_updates": 0}
    at_least |= {"metrics.num_samples": 2} if cfg.metrics.extractor is not None else {}
    for key, least in at_least.items():
        value = OmegaConf.select(cfg, key, default=least)
        if value is None and key == "max_batch_per_device":
            continue
        if not isinstance(value, int) or value < least:
            raise UserError(f"{key}={value} must be a whole number, at least {least}")
    for section in (k for k in ("training", "distillation") if k in cfg):
        for key, value in cfg[section].items():
            allowed_null = key in ("ema_decay", "gradient_clip")
            limit = 1 if key in ("ema_decay", "dropout") else float("inf")
            if not ((value is None and allowed_null) or (isinstance(value, int | float) and 0 <= value < limit)):
                null = " or null" if allowed_null else ""
                raise UserError(f"{section}.{key}={value} must be a number in [0, {limit}){null}")
        accumulated_batches(cfg, cfg[section].batch_size, f"{section}.batch_size")
    if not (isinstance(cfg.label_dropout, int | float) and 0 <= cfg.label_dropout < 1):
        raise UserError(f"label_dropout={cfg.label_dropout} must be a number in [0, 1)")
    if cfg.label_dropout and not cfg.conditional:
        raise UserError(f"label_dropout={cfg.label_dropout} hides labels that nobody looks at: add conditional=true")
    _check_teacher_curve(cfg.metrics.teacher_curve)
    instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False)


def _check_teacher_curve(settings: DictConfig | None) -> None:
    if settings is None:
        return
    steps, names = settings.get("steps"), settings.get("samplers")
    counts = steps and all(isinstance(n, int) and n > 0 for n in steps)
    if not (counts and names and set(names) <= set(samplers())):
        raise UserError(
            f"metrics.teacher_curve={settings} must be null or list step counts and samplers, e.g. "
            f"metrics.teacher_curve={{steps:[1,2,4],samplers:[ddim,ancestral]}} (samplers: {', '.join(samplers())})"
        )


def accumulated_batches(cfg: DictConfig, batch_size: int, key: str = "batch_size") -> int:
    """How many batches' gradients each device adds up, so that all of them make one global batch of `batch_size`.

    The fewest, but not below trainer.accumulate_grad_batches, that give equal parts of at most
    cfg.max_batch_per_device images. Raises UserError where the batch cannot be divided so.
    """
    many = isinstance(cfg.trainer.devices, int) and cfg.trainer.devices > 0
    devices = (cfg.trainer.devices if many else max(1, torch.cuda.device_count())) * cfg.trainer.get("num_nodes", 1)
    least = cfg.trainer.accumulate_grad_batches
    per_device, rest = divmod(batch_size, devices * least)
    if rest:
        raise UserError(
            f"{key}={batch_size} cannot be divided into {devices * least} equal parts (devices times accumulated "
            f"batches): use a multiple of {devices * least}"
        )
    most = cfg.max_batch_per_device or per_device
    return least * next(k for k in range(1, per_device + 1) if per_device % k == 0 and per_device // k <= most)


def check_stable(cfg: DictConfig, denoiser: Denoiser) -> None:
    """A parameterization that distillation with this schedule survives, unless cfg.allow_unstable."""
    terminal = denoiser.schedule(torch.ones(1))
    if cfg.allow_unstable or denoiser.parameterization.stable_at_zero_snr or terminal > NEARLY_ZERO_SNR:
        return
    alpha = float(alpha_sigma(terminal)[0])
    raise UserError(
        f"parameterization={denoiser.parameterization.name} cannot be distilled with a schedule that ends at "
        f"log-SNR {float(terminal):g}: x_hat = (z - sigma eps) / alpha divides by alpha = {alpha:.2g}. Use "
        f"parameterization=x, x_eps or v, or allow_unstable=true to try all the same"
    )


def check_teacher(cfg: DictConfig, template: Denoiser, teacher: Denoiser) -> None:
    """A given teacher that is what the configuration says."""
    ours, theirs = template.architecture, teacher.architecture
    wrong = [
        f"{k} {theirs[k]!r}, configured {ours[k]!r}"
        for k in ("parameterization", "schedule", "null_label")
        if ours[k] != theirs[k]
    ]
    network = {k for k in ours["network"] if ours["network"][k] != theirs["network"].get(k)}
    wrong += [f"network.{k} {theirs['network'].get(k)}, configured {ours['network'][k]}" for k in sorted(network)]
    if wrong:
        raise UserError(
            f"teacher={cfg.teacher} differs from the configuration: it has {'; '.join(wrong)}. Set conditional, "
            f"label_dropout and the groups parameterization, schedule, network and dataset to what the teacher was "
            f"trained with"
        )
    if teacher.num_steps is not None and teacher.num_steps != cfg.steps.plan[0]:
        raise UserError(
            f"teacher={cfg.teacher} was distilled for {teacher.num_steps} steps, and steps.plan starts at "
            f"{cfg.steps.plan[0]}: start the plan at {teacher.num_steps}"
        )
