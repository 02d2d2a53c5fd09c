"""Compiled, channels last, activations computed twice: faster or smaller, and the same training."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, Trainer
from omegaconf import OmegaConf
from test_training import PLAIN, STAGE, StopAt, new_denoiser, recipe, train

from pdistill import __version__, heads, lora
from pdistill.commands import job, run_directory
from pdistill.commands.settings import conf
from pdistill.errors import Interrupted, UserError
from pdistill.files import write_json
from pdistill.method.guidance import Guidance
from pdistill.method.multistep_consistency import MultistepConsistency
from pdistill.method.parallel_decoding import ParallelDecoding
from pdistill.method.tract import Tract
from pdistill.network import unet, with_guidance
from pdistill.storage import describe
from pdistill.training import execution
from pdistill.training.distillation import DistillationModule
from pdistill.training.settings import Execution
from pdistill.training.teacher import TeacherModule


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its last step, C++, which takes a minute; a break of the graph is an error."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_network(network, mode):
        network.compile(backend=backend, fullgraph=True, dynamic=False)

    monkeypatch.setattr(execution, "compile_network", compile_network)
    return graphs


def trained(directory, execution: Execution, method=None, precision: str = "32-true", base=None, **options):
    """A student, or with method="teacher" a teacher, after six updates; with dropout, unless `base` has none."""
    made = replace(base or recipe(), execution=execution, label_dropout=0.5 if method == "teacher" else 0.0)
    denoiser = new_denoiser(**options)
    if options:
        denoiser.null_label = options["num_classes"] - 1
    module = TeacherModule(denoiser, made) if method == "teacher" else None
    if module is None:
        stage = replace(STAGE, counts=(4, 2)) if isinstance(method, ParallelDecoding) else STAGE
        stage = replace(stage, called="guided") if isinstance(method, Guidance) else stage
        module = DistillationModule(denoiser, stage, made, method)
    losses = Losses()
    options = {"accelerator": "cpu", "devices": 1, "precision": precision}
    train(module, directory, trainer=partial(Trainer, **options), callbacks=[losses])
    return module, losses.seen


class Losses(Callback):
    """Those of each update."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def distance(a, b) -> float:
    """The largest difference of two modules' weights."""
    theirs = b.state_dict()
    return max(float((value - theirs[name]).abs().max()) for name, value in a.state_dict().items())


@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        ("teacher", 1),
        (None, 2),  # student and teacher
        (Tract(), 3),  # and the self-teacher
        (MultistepConsistency(8, 16), 3),  # the student with gradients and without
        (ParallelDecoding(), 2),
        (Guidance(low=1.0, high=3.0), 2),
    ],
    ids=["teacher", "halving", "tract", "multistep_consistency", "parallel_decoding", "guidance"],
)
def test_compiled_networks_have_one_graph_each_and_train_alike(method, graphs, traced, tmp_path):
    options = {"num_classes": 5} if method == "teacher" or isinstance(method, Guidance) else {}
    plain, losses = trained(tmp_path / "plain", Execution(), copy.deepcopy(method), **options)
    assert not traced
    compiled, theirs = trained(tmp_path / "compiled", Execution(compile=True), copy.deepcopy(method), **options)
    assert len(traced) == graphs
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert theirs == pytest.approx(losses, rel=1e-4)
    assert describe(compiled.result) == describe(plain.result)
    assert not list((tmp_path / "compiled").rglob("*_orig_mod*"))


def test_a_compiled_stage_is_resumed_to_the_byte(traced, tmp_path):
    options = Execution(compile=True, channels_last=True)
    whole, _ = trained(tmp_path / "whole", options)
    student = DistillationModule(new_denoiser(), STAGE, recipe(execution=options))
    with pytest.raises(Interrupted):
        train(student, tmp_path / "stopped", callbacks=[StopAt(3)])
    again = DistillationModule(new_denoiser(), STAGE, recipe(execution=options))
    train(again, tmp_path / "stopped")
    assert distance(again, whole) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_code_that_torch_compiles_trains_alike_and_is_resumed_to_the_byte(mode, tmp_path):
    options = Execution(compile=True, compile_mode=mode)
    whole, losses = trained(tmp_path / "whole", options)
    assert losses == pytest.approx(trained(tmp_path / "plain", Execution())[1], rel=1e-3)
    with pytest.raises(Interrupted):
        train(
            DistillationModule(new_denoiser(), STAGE, recipe(execution=options)), tmp_path / "s", callbacks=[StopAt(3)]
        )
    again = DistillationModule(new_denoiser(), STAGE, recipe(execution=options))
    train(again, tmp_path / "s")
    assert distance(again, whole) == 0


@pytest.mark.parametrize("change", ["channels_last", "gradient_checkpointing"])
def test_layout_and_checkpointing_change_the_rounding_alone(change, tmp_path):
    base = PLAIN if change == "channels_last" else None  # masks of dropout are drawn as the activations lie in memory
    plain, losses = trained(tmp_path / "plain", Execution(), base=base)
    changed, theirs = trained(tmp_path / "changed", Execution(**{change: True}), base=base)
    assert theirs == pytest.approx(losses, rel=1e-3 if change == "channels_last" else 0)
    if change == "channels_last":
        weight = changed.student.network.get_parameter("down_blocks.0.resnets.0.conv1.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    else:
        assert distance(changed, plain) == 0
        assert not changed.student.network.is_gradient_checkpointing


def test_a_stage_is_resumed_in_another_layout(tmp_path, capfd):
    """The optimizer's averages follow the weights; read as they lay before, they would belong to others."""
    whole, _ = trained(tmp_path / "whole", Execution(), base=PLAIN)
    student = DistillationModule(new_denoiser(), STAGE, PLAIN)
    with pytest.raises(Interrupted):
        train(student, tmp_path / "stopped", callbacks=[StopAt(3)])
    again = DistillationModule(new_denoiser(), STAGE, replace(PLAIN, execution=Execution(channels_last=True)))
    train(again, tmp_path / "stopped")
    name = "denoiser.network.down_blocks.0.resnets.0.conv1.weight"
    assert again.get_parameter(name).detach().allclose(whole.get_parameter(name), atol=1e-5)
    assert "channels_last False -> True" in capfd.readouterr().err


def test_the_end_of_a_network_is_in_float32_under_bfloat16(tmp_path):
    """Of the same halves before it, the last convolution gives what float32 gives, not its nearest bfloat16."""
    denoiser = new_denoiser().eval()
    z, t, inputs = torch.randn(4, 1, 8, 8), torch.rand(4), []
    denoiser.network.conv_out.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
    plain = torch.nn.Conv2d.forward
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rounded = denoiser.output(z, t)
        with execution.exact_end(denoiser.network):
            exact = denoiser.output(z, t)
    assert type(denoiser.network.conv_out) is torch.nn.Conv2d
    with torch.inference_mode():
        expected = plain(denoiser.network.conv_out, inputs[-1].float())
    assert exact.equal(expected) and exact.dtype == torch.float32
    assert rounded.equal(rounded.bfloat16().float()) and not exact.equal(exact.bfloat16().float())
    halves, losses = trained(tmp_path / "halves", Execution(), precision="bf16-mixed")
    assert all(value.dtype == torch.float32 for value in halves.state_dict().values() if value.is_floating_point())
    assert losses == pytest.approx(trained(tmp_path / "floats", Execution())[1], rel=0.03)


def test_adapters_heads_and_guidance_have_one_graph(traced):
    """Other networks than the plain one, forwards and back."""
    z, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    label, guidance = torch.tensor([0, 1]), torch.tensor([1.0, 2.0])
    attended = unet(8, 1, 1, 32, 64, [1], 1, [8])
    adapted = new_denoiser()
    adapted.network = attended
    lora.add(adapted, 2)
    grown = heads.grown(new_denoiser(), 4, (2,))
    guided = new_denoiser(num_classes=3)
    guided.network = with_guidance(guided.network)
    for denoiser, condition in ((adapted, None), (grown, None), (guided, {"label": label, "guidance": guidance})):
        expected = denoiser.output(z, t, condition)
        execution.compile_network(denoiser.network, "default")
        output = denoiser.output(z, t, condition)
        output.sum().backward()
        assert output.detach().allclose(expected, atol=1e-5)
        assert not any("_orig_mod" in name for name in denoiser.state_dict())
        assert copy.deepcopy(denoiser).output(z, t, condition).shape == output.shape
    assert len(traced) == 3


def test_precision_of_float32_is_set_and_given_back(tmp_path):
    seen = []

    class Looks(StopAt):
        def on_update(self, trainer, module, update):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for precision in ("default", "highest", "high"):
        module = TeacherModule(new_denoiser(), recipe(execution=Execution(matmul_precision=precision)))
        train(module, tmp_path / precision, updates=1, callbacks=[Looks(0)])
    assert seen == [("highest", True), ("highest", False), ("high", True)]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compile_mode": "fast", "compile": True}, ["compile_mode=fast", "reduce-overhead"]),
        ({"compile_mode": "reduce-overhead"}, ["compile_mode=reduce-overhead", "compile=true"]),
        ({"matmul_precision": "tf32"}, ["matmul_precision=tf32", "highest"]),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(UserError) as error:
        Execution(**changes)
    assert all(word in str(error.value) for word in words)


def test_networks_and_machines_that_cannot(monkeypatch):
    with pytest.raises(UserError, match="gradient_checkpointing=true needs"):
        execution.check(Execution(gradient_checkpointing=True), torch.nn.Conv2d(1, 1, 1))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        execution.check(Execution(compile=True), torch.nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize(
    ("precision", "known", "lines"), [("bf16-mixed", False, 1), ("bf16-mixed", True, 0), (32, False, 0)]
)
def test_bfloat16_without_instructions_is_said(monkeypatch, capsys, precision, known, lines):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: known)
    trainer = Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    capsys.readouterr()
    job.warn_of_emulation(trainer)
    assert capsys.readouterr().out.count("trainer.precision=bf16-mixed takes several times as long") == lines


def test_a_key_that_a_run_is_older_than_has_its_default(tmp_path, monkeypatch):
    """A run begun before a key existed is continued with the key's default, and refused with another value."""

    def composed(*overrides):
        words = [f"output_root={tmp_path}", "name=older", *overrides]
        with initialize_config_dir(str(conf()), version_base="1.3"):
            whole = compose("distill", words, return_hydra_config=True)
            monkeypatch.setattr(HydraConfig.instance(), "cfg", whole)
            return compose("distill", words)

    (tmp_path / "older").mkdir()
    config = OmegaConf.to_container(composed(), resolve=True)
    del config["distillation"]["max_teacher_steps"], config["method"]["stochastic"], config["compile"]
    OmegaConf.save(OmegaConf.create(config), tmp_path / "older" / "config.yaml")
    write_json(tmp_path / "older" / "run.json", {"version": __version__, "teacher": None})
    for same in ("distillation.max_teacher_steps=2", "method.stochastic=false", "compile=true"):
        assert run_directory.find(composed(same), "summary.json")[0] == tmp_path / "older"
    with pytest.raises(UserError, match=r"distillation\.max_teacher_steps: 4, was 2"):
        run_directory.find(composed("distillation.max_teacher_steps=4"), "summary.json")
    with pytest.raises(UserError, match=r"method\.stochastic: True, was False"):
        run_directory.find(composed("method.stochastic=true"), "summary.json")
