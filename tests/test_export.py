"""A sampler as one file gives the images of `sample`; the command refuses what it cannot write."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pdistill import sample
from pdistill.commands import export as command
from pdistill.dataset.batches import to_uint8
from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.interop import export
from pdistill.network import unet, with_guidance
from pdistill.parameterization import Edm, V
from pdistill.schedule import BetaSchedule, CosineSchedule, EdmSchedule, FlowSchedule

pytest.importorskip("onnxruntime", reason="pip install 'pdistill[export]'")

PROCESSES = {
    "variance preserving": CosineSchedule(),
    "zero terminal SNR": CosineSchedule(logsnr_min=float("-inf")),
    "flow": FlowSchedule(),
    "variance exploding": EdmSchedule(),
}


def noise_of(size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def made(tiny, kind: str, schedule=None, classes: int | None = None) -> Denoiser:
    """With classes, the last one stands for none."""
    other = tiny("v" if kind == "edm" else kind, num_classes=classes)
    parameterization = Edm() if kind == "edm" else other.parameterization
    null = None if classes is None else classes - 1
    return Denoiser(other.network, parameterization, schedule or other.schedule, null_label=null).eval()


KINDS = [(kind, process) for kind in ("x", "v", "x_eps", "eps", "flow", "edm") for process in PROCESSES]
KINDS = [k for k in KINDS if k not in (("eps", "zero terminal SNR"), ("eps", "flow"))]  # x_hat divides by zero


@pytest.mark.parametrize(("kind", "process"), KINDS)
@torch.no_grad()
def test_the_module_is_the_sampler(tiny, kind, process):
    denoiser = made(tiny, kind, PROCESSES[process])
    for num_steps, clip in ((1, True), (4, True), (4, False)):
        module = export.Sampler(denoiser, export.Graph(num_steps, clip, dtype="float32"))
        for size, tolerance in ((3, 1e-6), (65, 1e-4)):  # from 64 images on, diffusers' layout in memory is another
            ours = sample(denoiser, noise_of(size), num_steps, clip=clip)
            assert (module(noise_of(size)) - ours).abs().max() <= tolerance * ours.abs().max()


@torch.no_grad()
def test_the_module_takes_labels_and_guidance(tiny):
    denoiser, label = made(tiny, "x_eps", classes=4), torch.tensor([0, 1, 2])
    for guidance in (1.0, 2.5):
        module = export.Sampler(denoiser, export.Graph(2, guidance=guidance, dtype="float32"))
        ours = sample(denoiser, noise_of(3), 2, label, guidance=guidance)
        torch.testing.assert_close(module(noise_of(3), label), ours, atol=1e-6, rtol=0)
    assert not torch.equal(ours, sample(denoiser, noise_of(3), 2, label))


@torch.no_grad()
def test_a_network_of_diffusers_own_recipe_is_traced_for_any_batch():
    """Its upsampling is a layer of its own, in which the batch size decides, too."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    small = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    network = UNet2DModel(8, 1, 1, down_block_types=down, up_block_types=up, **small)
    schedule = BetaSchedule(tuple(torch.linspace(0.999, 0.005, 100).tolist()))
    denoiser = Denoiser(network.eval(), V(), schedule)
    module = export.Sampler(denoiser, export.Graph(2, dtype="float32"))
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    traced = torch.export.export(module, (noise_of(2),), dynamic_shapes=shapes).module()
    for size in (1, 65):
        assert (traced(noise_of(size)) - sample(denoiser, noise_of(size), 2)).abs().max() < 1e-4


def guided(tiny, low: float, high: float, kind: str = "v") -> Denoiser:
    """A student of 2 steps that was taught guidance from low to high, and heeds it."""
    denoiser = made(tiny, kind, classes=4)
    denoiser.num_steps, denoiser.guidance = 2, (low, high)
    if denoiser.takes_guidance:
        denoiser.network = with_guidance(denoiser.network)
        torch.nn.init.normal_(denoiser.network.class_embedding.guidance.linear_2.weight)
    return denoiser.eval()


@torch.no_grad()
def test_guidance_is_an_input_where_a_range_was_taught(tiny):
    denoiser, label = guided(tiny, 1.0, 5.0), torch.tensor([0, 1, 2])
    module = export.Sampler(denoiser, export.Graph(2, dtype="float32"))
    ours = [sample(denoiser, noise_of(3), 2, label, guidance=g) for g in (1.0, 2.5, 5.0)]
    assert (ours[0] - ours[2]).abs().max() > 1e-2
    images = module(noise_of(3), label, torch.tensor([1.0, 2.5, 5.0]))
    each = torch.stack([ours[k][k] for k in range(3)])
    torch.testing.assert_close(images, each, atol=1e-5, rtol=0)
    fixed = export.Sampler(denoiser, export.Graph(2, guidance=2.5, dtype="float32"))
    torch.testing.assert_close(fixed(noise_of(3), label), ours[1], atol=1e-5, rtol=0)
    one = guided(tiny, 2.0, 2.0)
    ours = sample(one, noise_of(3), 2, label)
    module = export.Sampler(one, export.Graph(2, dtype="float32"))
    torch.testing.assert_close(module(noise_of(3), label), ours, atol=1e-5, rtol=0)


def test_the_command_writes_guidance_as_an_input(tmp_path, capsys):
    import onnxruntime

    def smallest(name: str, num_classes: int) -> Denoiser:
        network = unet(8, 1, 1, 32, 32, [1], 1, [], num_classes=num_classes)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
        return Denoiser(network, V(), CosineSchedule())

    student = guided(smallest, 1.1, 4.9)
    student.num_steps = 1
    student.save(directory := tmp_path / "guided")
    command.main([str(directory)])
    names: dict = {}
    exec("\n".join(line.strip() for line in capsys.readouterr().out.splitlines()[-3:]), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["inputs"]["guidance"].dtype == "float32"
    session = onnxruntime.InferenceSession(tmp_path / "guided-1-steps.onnx")
    assert [given.name for given in session.get_inputs()] == ["noise", "label", "guidance"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["pdistill_guidance"]) == [1.1, 4.9]
    denoiser, run = Denoiser.load(directory), export.open_onnx(tmp_path / "guided-1-steps.onnx")
    for size in (1, 65):
        labels, guidance = torch.arange(size) % 3, torch.full((size,), 3.0)
        ours = to_uint8(sample(denoiser, noise_of(size), 1, labels, guidance=3.0)).int()
        off = (run(noise_of(size), labels, guidance).int() - ours).abs()
        assert off.max() <= 1 and off.float().mean() < 1e-2
    assert (run(noise_of(65), labels, torch.full((65,), 1.1)).int() - ours).abs().max() > 10


def test_what_a_file_says_of_guidance_and_is_checked_with(tiny):
    ranged, one, plain = guided(tiny, 1.0, 5.0), guided(tiny, 2.0, 2.0), made(tiny, "v", classes=4)
    said = lambda denoiser, g: export._metadata(denoiser, export.Graph(2, guidance=g))["pdistill_guidance"]  # noqa: E731
    assert [json.loads(said(ranged, g)) for g in (None, 3.0)] == [[1.0, 5.0], 3.0]
    assert [json.loads(said(denoiser, None)) for denoiser in (one, plain)] == [2.0, 1.0]
    graph = export.Graph(2, dtype="float32")
    module = torch.no_grad()(export.Sampler(ranged, graph))
    assert export.difference(ranged, graph, module).largest < 1e-5
    deaf = lambda noise, label, guidance: module(noise, label, torch.full_like(guidance, 1.0))  # noqa: E731
    assert export.difference(ranged, graph, deaf).largest > 1e-2


def check(denoiser: Denoiser, graph: export.Graph, run: export.Run, label: bool = False) -> None:
    """Parity with `sample` at batch sizes that the file was not made with, and around diffusers' branch."""
    for size in (1, 3, 65):
        labels = torch.arange(size) % 3 if label else None
        ours = sample(denoiser, noise_of(size), graph.num_steps, labels, clip=graph.clip, guidance=graph.guidance)
        theirs = run(noise_of(size), labels)
        if graph.dtype == "uint8":
            assert theirs.dtype == torch.uint8
            off = (theirs.int() - to_uint8(ours).int()).abs()
            assert off.max() <= 1 and off.float().mean() < 1e-3  # where 1e-4 decides the rounding
        else:
            assert (theirs - ours).abs().max() < 1e-4


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student's directory: 2 steps, random weights."""
    torch.manual_seed(0)
    network = unet(8, 1, 1, 32, 32, [1, 1], 1, [])
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    denoiser = Denoiser(network, V(), CosineSchedule(), num_steps=2, lineage=["teacher", 4, 2]).eval()
    denoiser.save(directory := tmp_path_factory.mktemp("student") / "denoiser")
    return directory


def test_the_command_writes_an_onnx_file(student, tmp_path, capsys, monkeypatch):
    import onnx

    file = tmp_path / "new" / "sampler.onnx"
    command.main([str(student), "--output", str(file)])
    assert [path.name for path in file.parent.iterdir()] == ["sampler.onnx"]
    denoiser = Denoiser.load(student)
    check(denoiser, export.Graph(2), export.open_onnx(file))
    model = onnx.load(file)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["pdistill_lineage"]) == ["teacher", 4, 2] and said["pdistill_num_steps"] == "2"
    assert said["pdistill_fingerprint"] == denoiser.fingerprint and said["pdistill_clip"] == "true"
    assert not any(node.metadata_props for node in model.graph.node)  # which name directories of the machine
    size = 4 * sum(p.numel() for p in denoiser.parameters())
    assert file.stat().st_size < 1.5 * size  # every step uses the same weights
    names: dict = {}
    exec("\n".join(line.strip() for line in capsys.readouterr().out.splitlines()[-3:]), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["images"].dtype == "uint8"


def test_float_images_under_onnxruntime(student, tmp_path):
    denoiser, graph = Denoiser.load(student), export.Graph(2, clip=False, dtype="float32")
    export.write_onnx(denoiser, graph, tmp_path / "a.onnx")
    check(denoiser, graph, export.open_onnx(tmp_path / "a.onnx"))


def test_a_file_that_differs_is_not_written(student, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_onnx", lambda denoiser, graph, file, int8: file.write_bytes(b"no graph"))
    monkeypatch.setattr(export, "open_onnx", lambda file: lambda noise: torch.zeros_like(noise))
    for extra in ([], ["--int8"]):
        with pytest.raises(UserError, match="nothing was written"):
            command.main([str(student), "--output", str(tmp_path / "a.onnx"), "--dtype", "float32", *extra])
    assert not list(tmp_path.iterdir())


BAD = [
    ("absent", "no denoiser at absent"),
    ("STUDENT --format tflite", "invalid choice: 'tflite'"),
    ("TEACHER", "give --steps"),
    ("STUDENT --steps 0", "--steps=0 must be a whole number"),
    ("STUDENT --output FOLDER", "is a directory: give a file"),
    ("STUDENT --output a.pt2", "must end in .onnx"),
    ("STUDENT --format pt2 --int8", "--int8 is for --format onnx"),
    ("STUDENT --guidance 2", "not class-conditional: leave it out"),
    ("STUDENT --guidance nan", "must be a number"),
    ("NO_NULL --steps 1 --guidance 2", "trained with label_dropout"),
    ("RANGE --guidance 6", "was taught guidance from 1 to 5: give that, or leave it out"),
    ("ONE --guidance 3", "was taught guidance 2 alone: give that, or leave it out"),
]


@pytest.mark.parametrize(("typed", "said"), BAD)
def test_bad_input_is_told_in_one_line(typed, said, student, tiny, tmp_path):
    places = {"STUDENT": str(student), "FOLDER": str(tmp_path)}
    makers = {"TEACHER": tiny, "NO_NULL": lambda: tiny(num_classes=3)}
    makers |= {"RANGE": lambda: guided(tiny, 1.0, 5.0), "ONE": lambda: guided(tiny, 2.0, 2.0)}
    for name, make in makers.items():
        if name in typed:
            make().save(tmp_path / name)
            places[name] = str(tmp_path / name)
    with pytest.raises(UserError, match=said) as error:
        command.main([places.get(word, word) for word in typed.split()])
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(student, tmp_path, monkeypatch):
    found = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    with pytest.raises(UserError, match=r"needs onnx: pip install 'pdistill\[export\]'"):
        command.main([str(student)])
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    from torch._inductor import cpp_builder

    getattr(cpp_builder.get_cpp_compiler, "cache_clear", lambda: None)()
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        command.main([str(student), "--format", "pt2"])


SLOW = {
    "x_eps with labels": ("x_eps", CosineSchedule(), export.Graph(2), 4),
    "guidance": ("v", CosineSchedule(), export.Graph(2, guidance=2.0, dtype="float32"), 4),
    "edm": ("edm", EdmSchedule(), export.Graph(3, dtype="float32"), None),
    "flow": ("flow", FlowSchedule(), export.Graph(3, dtype="float32"), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("case", SLOW)
def test_parity(tiny, tmp_path, case, form):
    kind, schedule, graph, classes = SLOW[case]
    denoiser, file = made(tiny, kind, schedule, classes), tmp_path / f"sampler.{form}"
    (export.write_onnx if form == "onnx" else export.write_pt2)(denoiser, graph, file)
    check(denoiser, graph, (export.open_onnx if form == "onnx" else export.open_pt2)(file), classes is not None)


@pytest.mark.slow
def test_a_package_takes_guidance(tiny, tmp_path):
    denoiser, graph, file = guided(tiny, 1.0, 5.0), export.Graph(2, dtype="float32"), tmp_path / "sampler.pt2"
    export.write_pt2(denoiser, graph, file)
    assert export.difference(denoiser, graph, export.open_pt2(file), (1, 3, 65)).largest < 1e-4


@pytest.mark.slow
def test_the_command_writes_a_package(student, tmp_path, capsys):
    file = tmp_path / "sampler.pt2"
    command.main([str(student), "--format", "pt2", "--output", str(file)])
    check(Denoiser.load(student), export.Graph(2), export.open_pt2(file))
    said = torch._inductor.aoti_load_package(str(file)).get_metadata()
    assert said["pdistill_num_steps"] == "2" and json.loads(said["pdistill_lineage"]) == ["teacher", 4, 2]
    names: dict = {}
    exec("\n".join(line.strip() for line in capsys.readouterr().out.splitlines()[-3:]), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["images"].dtype == torch.uint8


@pytest.mark.slow
def test_int8_is_smaller_and_close(student, tmp_path):
    import onnx

    denoiser, graph = Denoiser.load(student), export.Graph(2, dtype="float32")
    export.write_onnx(denoiser, graph, tmp_path / "a.onnx")
    export.write_onnx(denoiser, graph, tmp_path / "b.onnx", int8=True)
    assert (tmp_path / "b.onnx").stat().st_size < 0.6 * (tmp_path / "a.onnx").stat().st_size
    off = export.difference(denoiser, graph, export.open_onnx(tmp_path / "b.onnx"), (1, 64))
    assert 0 < off.rms < 0.05
    assert {p.key: p.value for p in onnx.load(tmp_path / "b.onnx").metadata_props}["pdistill_int8"] == "true"


@pytest.mark.slow
def test_the_benchmark_measures_all(student, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", str(student), "--repeats", "1"])
    runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "export.py"), run_name="__main__")
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2:] == ["eager", "ONNX", "ONNX int8", "pt2"]
