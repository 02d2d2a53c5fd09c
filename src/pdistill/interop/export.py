"""A denoiser's whole sampler as one file: an ONNX graph, or a package compiled by torch's AOTInductor (.pt2).

Either takes unit noise, float32 (B, C, H, W), of a class-conditional denoiser labels, int64 (B,), and of a student that
was taught a range of guidance that, float32 (B,), for any B. It gives images: uint8, or float32 in [-1, 1]. Nothing of
this project is needed to run it.
"""

import contextlib
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from pdistill import network as networks
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError, first_line
from pdistill.parameterization import broadcast
from pdistill.randomness import sample_noise
from pdistill.sampling import Condition, sample
from pdistill.schedule import logsnr_on_grid

Run = Callable[..., Tensor]  # (noise, label, guidance) -> images, of a file that was opened; None for no input

TOLERANCE = 1e-4  # in [-1, 1]: how far a file's images may be from ours
INT8_TOLERANCE = 0.1  # the same for int8, root mean square
INPUTS = ("noise", "label", "guidance")  # in their order, as far as a file takes them
CHECKED = (1, 3)  # batch sizes
INT8_CHECKED = (1, 64)  # of a mean, there must be more
CALIBRATED = (4, 64)  # batches, and images of a batch, whose activations int8 scales are taken from
LARGEST_ONNX = 1.8e9  # bytes of weights; a protobuf file ends at 2 GB


@dataclass(frozen=True)
class Graph:
    """What a file computes: `sample(denoiser, noise, num_steps, label, clip=clip, guidance=guidance)`, as `dtype`."""

    num_steps: int
    clip: bool = True
    guidance: float | None = None
    """Fixed in the file. None: an input, of a denoiser that was taught a range; of any other its own."""
    dtype: Literal["uint8", "float32"] = "uint8"
    """uint8 is clipped and rounded to the nearest; float32 is in [-1, 1] if clipped."""


class Sampler(nn.Module):
    """The DDIM steps of `sampling.sample`, unrolled, with all that the schedule says held in buffers.

    Row i of a buffer is t = i / num_steps, i = 0, ..., num_steps. `sampler(noise, label, guidance) -> images`.
    """

    alpha: Tensor
    sigma: Tensor
    timestep: Tensor

    def __init__(self, denoiser: Denoiser, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.network = _for_any_batch(denoiser.network).eval()
        self.parameterization = denoiser.parameterization
        self.null_label = denoiser.null_label
        self.takes_guidance = denoiser.takes_guidance
        self.guidance = fixed_guidance(denoiser, graph)
        self.extrapolation = 1.0 if denoiser.guidance is not None else self.guidance or 0.0
        self.noise_scale = float(getattr(denoiser.schedule, "noise_scale", 1.0))
        grid = torch.arange(graph.num_steps + 1, dtype=torch.float32)
        alpha, sigma = denoiser.schedule.alpha_sigma(logsnr_on_grid(denoiser.schedule, grid, graph.num_steps))
        self.register_buffer("alpha", alpha)
        self.register_buffer("sigma", sigma)
        self.register_buffer("timestep", denoiser.schedule.timestep(grid / graph.num_steps))

    def forward(self, noise: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """Unit noise (B, C, H, W), labels (B,), guidance (B,) where the graph fixes none -> images (B, C, H, W)."""
        condition: Condition = label
        if label is not None and self.takes_guidance:
            given = guidance if self.guidance is None else torch.full_like(label, self.guidance, dtype=torch.float32)
            condition = {"label": label} | ({} if given is None else {"guidance": given})
        x_hat = z = noise * self.noise_scale
        for i in range(self.graph.num_steps, 0, -1):
            x_hat = self._x_hat(z, i, condition)
            if label is not None and self.extrapolation != 1:
                none = self._x_hat(z, i, torch.full_like(label, self.null_label or 0))
                x_hat = torch.lerp(none, x_hat, self.extrapolation)
            if self.graph.clip:
                x_hat = x_hat.clamp(-1, 1)
            if i > 1:
                ratio = self.sigma[i - 1] / self.sigma[i]
                z = ratio * z + (self.alpha[i - 1] - ratio * self.alpha[i]) * x_hat
        if self.graph.dtype == "float32":
            return x_hat
        return ((x_hat.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _x_hat(self, z: Tensor, i: int, condition: Condition) -> Tensor:
        """As `Denoiser.forward` at t = i / num_steps."""
        alpha, sigma = broadcast(self.alpha[i], z), broadcast(self.sigma[i], z)
        scale = getattr(self.parameterization, "scale_input", None)
        scaled = z if scale is None else scale(z, alpha, sigma)
        output = networks.call(self.network, scaled, self.timestep[i].expand(z.shape[0]), condition)
        return self.parameterization.to_x(output, z, alpha, sigma)


def fixed_guidance(denoiser: Denoiser, graph: Graph) -> float | None:
    """The guidance that the file holds; None where it is an input."""
    if graph.guidance is None and denoiser.takes_guidance:
        return None
    return denoiser.default_guidance if graph.guidance is None else graph.guidance


class _Upsample(nn.Module):
    """What diffusers' Upsample2D computes."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor, output_size: Any = None) -> Tensor:
        return self.convolution(functional.interpolate(images, scale_factor=2.0, mode="nearest"))


def _for_any_batch(network: nn.Module) -> nn.Module:
    """A copy whose graph holds for every batch size.

    diffusers' upsampling makes its input contiguous from 64 images on: the same numbers, but a branch on the batch
    size, which no graph of a free one can hold.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, ResnetBlock2D) and module.upsample is not None:
            module.downsample, module.upsample = module.upsample, None  # called alike, but without the branch
        for name, child in list(module.named_children()):
            if isinstance(child, Upsample2D) and child.interpolate and child.norm is None:
                convolution = (child.conv if child.name == "conv" else child.Conv2d_0) if child.use_conv else None
                setattr(module, name, _Upsample(convolution or nn.Identity()))
    return network


def write_onnx(denoiser: Denoiser, graph: Graph, file: Path, int8: bool = False) -> None:
    """The sampler as an ONNX graph with inputs "noise" (and "label", "guidance") and output "images".

    Where `int8`, convolutions are in 8 bits (weights by channel, activations by the range that they have on the
    sampler's own trajectories). Raises UserError for what ONNX cannot say, or hold in one file.
    """
    if (size := sum(p.nbytes for p in denoiser.network.parameters())) > LARGEST_ONNX:
        raise UserError(
            f"the network has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2 GB: use --format pt2"
        )
    from onnx_ir.passes import common

    batch = {0: "batch"}
    with _in_one_line("onnx"):
        names = list(_inputs(denoiser, graph, 2))
        program = torch.onnx.export(
            _program(denoiser, graph),
            input_names=names,
            output_names=["images"],
            dynamic_shapes=dict.fromkeys(names, batch),
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # it is for exporters of old
        # Every node has a stack trace of this machine, and every step its own copy of what was folded from the weights.
        common.ClearMetadataAndDocStringPass()(program.model)
        common.DeduplicateInitializersPass(size_limit=2**31)(program.model)
        program.model.metadata_props.update(_metadata(denoiser, graph, int8))
        if not int8:
            return program.save(file, external_data=False)
        with tempfile.TemporaryDirectory() as folder:
            program.save(whole := Path(folder, "float.onnx"), external_data=False)
            _quantize(whole, file, denoiser, graph)
    return None


def _quantize(whole: Path, file: Path, denoiser: Denoiser, graph: Graph) -> None:
    from onnxruntime import quantization

    class Trajectories(quantization.CalibrationDataReader):
        batches = iter([_inputs(denoiser, graph, CALIBRATED[1], k * CALIBRATED[1]) for k in range(CALIBRATED[0])])

        def get_next(self) -> Any:
            inputs = next(self.batches, None)
            return None if inputs is None else {name: tensor.numpy() for name, tensor in inputs.items()}

    quantization.quantize_static(
        whole,
        file,
        Trajectories(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )


def write_pt2(denoiser: Denoiser, graph: Graph, file: Path) -> None:
    """The sampler compiled for this kind of processor; `file` ends in .pt2. Raises UserError where that fails."""
    with _in_one_line("pt2"):
        torch._inductor.aoti_compile_and_package(
            _program(denoiser, graph),
            package_path=str(file),
            inductor_configs={"aot_inductor.metadata": _metadata(denoiser, graph)},
        )


def open_onnx(file: Path) -> Run:
    """The file under onnxruntime, on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor | None) -> Tensor:
        named = {name: given.numpy() for name, given in zip(INPUTS, inputs, strict=False) if given is not None}
        return torch.from_numpy(session.run(None, named)[0])

    return run


def open_pt2(file: Path) -> Run:
    """The package, loaded by torch."""
    with _in_one_line("pt2"):
        package = torch._inductor.aoti_load_package(str(file))
    return torch.no_grad()(lambda *inputs: package(*(given for given in inputs if given is not None)))


def check_pt2() -> None:
    """Raises UserError where there is no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            "--format pt2 needs a C++ compiler, and none is found: install g++, or set CXX=<compiler>; --format onnx "
            "needs none"
        ) from error


@dataclass(frozen=True)
class Difference:
    """Of a file's images from those of `sample`, in [-1, 1]; of uint8 images, beyond their rounding."""

    largest: float
    rms: float


def difference(denoiser: Denoiser, graph: Graph, run: Run, sizes: Sequence[int] = CHECKED) -> Difference:
    """Over one batch of each size; where guidance is an input, of several values at once.

    Raises ValueError, as `sample` does, for guidance that the denoiser cannot take.
    """
    gaps = []
    for size in sizes:
        inputs = _inputs(denoiser, graph, size)
        images = _ours(denoiser, graph, inputs)
        theirs, rounding = run(*inputs.values()), 0.0
        if theirs.dtype == torch.uint8:
            images, theirs, rounding = images.clamp(-1, 1), theirs / 127.5 - 1, 0.5 / 127.5
        gaps.append(((images - theirs).abs() - rounding).clamp(min=0) / images.abs().max().clamp(min=1))
    gap = torch.cat(gaps)
    return Difference(float(gap.max()), float(gap.square().mean().sqrt()))


def _ours(denoiser: Denoiser, graph: Graph, inputs: dict[str, Tensor]) -> Tensor:
    """What `sample` draws, for each value of guidance by itself."""
    noise, label = inputs["noise"], inputs.get("label")
    values = _values(denoiser) if "guidance" in inputs else [graph.guidance]
    images, step = torch.empty_like(noise), len(values)
    for k, value in enumerate(values[: len(noise)]):
        labels = None if label is None else label[k::step]
        given: Any = {"clip": graph.clip, "guidance": value}
        images[k::step] = sample(denoiser, noise[k::step], graph.num_steps, labels, **given)
    return images


def _program(denoiser: Denoiser, graph: Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    inputs = tuple(_inputs(denoiser, graph, 2).values())
    with torch.no_grad():
        return torch.export.export(Sampler(denoiser, graph), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))


def _inputs(denoiser: Denoiser, graph: Graph, size: int, first: int = 0) -> dict[str, Tensor]:
    """What the file takes, in its order: images `first`, ..., of all classes and several values of guidance in turn."""
    indices = range(first, first + size)
    inputs = {"noise": sample_noise(0, indices, denoiser.image_shape)}
    if denoiser.num_classes is not None:
        inputs["label"] = torch.tensor(indices) % denoiser.num_classes
    if fixed_guidance(denoiser, graph) is None:
        values = _values(denoiser)
        inputs["guidance"] = torch.tensor([values[i % len(values)] for i in indices], dtype=torch.float32)
    return inputs


def _values(denoiser: Denoiser) -> list[float]:
    """Guidance that a file is checked with: the ends of the range and its middle."""
    low, high = denoiser.guidance or (1.0, 1.0)
    return [low, (low + high) / 2, high]


def _metadata(denoiser: Denoiser, graph: Graph, int8: bool = False) -> dict[str, str]:
    """What the file says of itself."""
    said = {
        "num_steps": graph.num_steps,
        "lineage": denoiser.lineage,
        "fingerprint": denoiser.fingerprint,
        "clip": graph.clip,
        "guidance": denoiser.guidance if (fixed := fixed_guidance(denoiser, graph)) is None else fixed,
        "int8": int8,
    }
    return {f"pdistill_{k}": v if isinstance(v, str) else json.dumps(v) for k, v in said.items()}


@contextlib.contextmanager
def _in_one_line(form: str) -> Iterator[None]:
    """torch's and onnxruntime's talk is left out, and their refusal is a UserError."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"this denoiser cannot be written as {form} ({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
