"""`pdistill export <denoiser>`: its whole sampler as one ONNX file or one compiled package, for who has no pdistill."""

import importlib.util
import math
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pdistill.commands.arguments import Parser, directory_of, without_imports
from pdistill.errors import UserError
from pdistill.files import whole

if TYPE_CHECKING:  # for types alone: torch is slow to import, and the arguments are checked first
    from pdistill.denoiser import Denoiser
    from pdistill.interop.export import Difference, Graph

FORMATS = ("onnx", "pt2")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def main(arguments: list[str]) -> None:
    """Writes the file that the arguments ask for, checked, and prints how to use it. Raises UserError otherwise."""
    parser = Parser("pdistill export", description="The whole sampler of a denoiser as one file.")
    parser.add_argument("denoiser", help="a denoiser's directory, e.g. outputs/demo/steps-0004/denoiser")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="onnx (default), or a compiled pt2 package")
    parser.add_argument("--steps", type=int, help="default: those that it was distilled for")
    parser.add_argument("--output", type=lambda path: Path(path).expanduser(), help="by default beside the denoiser")
    parser.add_argument("--dtype", choices=("uint8", "float32"), default="uint8", help="of the images; default uint8")
    parser.add_argument("--no-clip", action="store_true", help="do not clamp every x_hat to [-1, 1]")
    parser.add_argument("--guidance", type=float, help="fixed; default 1, or an input where a range was taught")
    parser.add_argument("--int8", action="store_true", help="onnx: convolutions in 8 bits")
    settings = parser.parse_args(without_imports(arguments))
    _check(settings)
    _export(settings, directory_of(settings.denoiser))


def _check(settings: Namespace) -> None:
    """What can be refused before anything is loaded."""
    output: Path | None = settings.output
    if settings.int8 and settings.format != "onnx":
        raise UserError(f"--int8 is for --format onnx, not {settings.format}: leave it out")
    if settings.steps is not None and settings.steps < 1:
        raise UserError(f"--steps={settings.steps} must be a whole number, at least 1")
    if settings.guidance is not None and not math.isfinite(settings.guidance):
        raise UserError(f"--guidance={settings.guidance} must be a number, e.g. --guidance 2")
    if output is not None and output.is_dir():
        raise UserError(f"--output={output} is a directory: give a file, e.g. {output / f'sampler.{settings.format}'}")
    if output is not None and output.suffix != f".{settings.format}":
        raise UserError(f"--output={output} must end in .{settings.format}, as --format {settings.format} says")
    if settings.format == "onnx" and (missing := [p for p in PACKAGES if importlib.util.find_spec(p) is None]):
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install 'pdistill[export]'")


def _export(settings: Namespace, directory: Path) -> None:
    from pdistill.commands.denoisers import check_guidance
    from pdistill.denoiser import Denoiser
    from pdistill.interop import export
    from pdistill.sampling import DDIM

    if settings.format == "pt2":
        export.check_pt2()
    if (directory / "denoiser" / "denoiser.json").exists():  # of a stage
        directory /= "denoiser"
    denoiser = Denoiser.load(directory)
    if denoiser.codec is not None:
        raise UserError(
            f"{directory} is conditioned on text, which no exported graph takes: open it by diffusers, "
            f"StableDiffusionPipeline.from_pretrained"
        )
    if denoiser.sampler != DDIM:
        raise UserError(
            f"{directory} was distilled for the sampler {denoiser.sampler}, and export writes {DDIM} alone: give a "
            f"student of method.stochastic=false"
        )
    num_steps = settings.steps or denoiser.num_steps
    if num_steps is None:
        raise UserError(f"{directory} is a teacher, made for no step count of its own: give --steps, e.g. --steps 16")
    if settings.guidance is not None:
        check_guidance(denoiser, settings.guidance, f"--guidance={settings.guidance:g}", str(directory))
    try:
        denoiser = denoiser.for_steps(num_steps)
    except ValueError as error:
        raise UserError(f"--steps={num_steps}: {error}") from error
    graph = export.Graph(num_steps, not settings.no_clip, settings.guidance, settings.dtype)
    kind = "-int8" if settings.int8 else ""
    file = settings.output or directory.with_name(f"{directory.name}-{num_steps}-steps{kind}.{settings.format}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{file.parent} may not be written to: give another place, --output=<file>.{settings.format}")
    print(f"writing {num_steps} steps of {directory} as {settings.format}; this takes a minute or two", flush=True)
    found = _write(denoiser, graph, file, settings.int8)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    beyond = ", beyond the rounding" if settings.dtype == "uint8" else ""
    print(f"differs from pdistill's images by {found.largest:.1e} at most, {found.rms:.1e} root mean square{beyond}")
    print("\n".join(["use it:", *usage(settings.format, file, denoiser, graph)]))


def _write(denoiser: "Denoiser", graph: "Graph", file: Path, int8: bool) -> "Difference":
    """The file, once its images are known to be ours."""
    from pdistill.interop import export

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder, f"sampler{file.suffix}")
        if file.suffix == ".onnx":
            export.write_onnx(denoiser, graph, scratch, int8)
            sizes = export.INT8_CHECKED if int8 else export.CHECKED
            found = export.difference(denoiser, graph, export.open_onnx(scratch), sizes)
        else:
            export.write_pt2(denoiser, graph, scratch)
            found = export.difference(denoiser, graph, export.open_pt2(scratch))
        _refuse(found, int8)
        with whole(file) as temporary:
            shutil.copyfile(scratch, temporary)
    return found


def _refuse(found: "Difference", int8: bool) -> None:
    from pdistill.interop import export

    if int8 and not found.rms <= export.INT8_TOLERANCE:
        raise UserError(
            f"int8 changes the images by {found.rms:.2g} (root mean square in [-1, 1]), more than "
            f"{export.INT8_TOLERANCE}; nothing was written: leave --int8 out"
        )
    if not int8 and not found.largest <= export.TOLERANCE:
        raise UserError(
            f"the file's images differ from pdistill's own by {found.largest:.2g}, more than {export.TOLERANCE:g}; "
            f"nothing was written"
        )


def usage(form: str, file: Path, denoiser: "Denoiser", graph: "Graph") -> list[str]:
    """Three lines of Python that draw 16 images from the file."""
    from pdistill.interop.export import fixed_guidance

    shape, labels = (16, *denoiser.image_shape), denoiser.num_classes
    low, high = denoiser.guidance or (1.0, 1.0)
    value = None if fixed_guidance(denoiser, graph) is not None else min(max(2.0, low), high)
    if form == "pt2":
        label = "" if labels is None else f", torch.arange(16) % {labels}"
        guidance = "" if value is None else f", torch.full((16,), {value})"
        return [
            "    import torch",
            f'    sampler = torch._inductor.aoti_load_package("{file}")',
            f"    images = sampler(torch.randn{shape}{label}{guidance})",
        ]
    label = "" if labels is None else f', "label": numpy.arange(16) % {labels}'
    guidance = "" if value is None else f', "guidance": numpy.full(16, {value}, "float32")'
    noise = f'"noise": numpy.random.default_rng().standard_normal({shape}, dtype="float32")'
    return [
        "    import numpy, onnxruntime",
        f"    inputs = {{{noise}{label}{guidance}}}",
        f'    images = onnxruntime.InferenceSession("{file}").run(None, inputs)[0]',
    ]
