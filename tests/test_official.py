"""The authors' checkpoints: parity with their network's output, and files that are none."""

import json
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdistill.denoiser import Denoiser
from pdistill.errors import UserError
from pdistill.interop import flax as official
from pdistill.interop.flax import infer_architecture, load_official_checkpoint
from pdistill.sampling import sample
from pdistill.schedule import timestep_of

DATA = Path(__file__).parent / "data"
WHOLE = (DATA / "official_unet_x.flax").read_bytes()


@pytest.mark.parametrize(("name", "num_steps"), [("x", 8), ("x_eps", 4)])
def test_parity(name, num_steps):
    denoiser = load_official_checkpoint(DATA / f"official_unet_{name}.flax", image_size=8)
    assert (denoiser.parameterization.name, denoiser.num_steps) == (name, num_steps)
    with np.load(DATA / f"official_unet_{name}.npz") as golden:
        x, logsnr, y, out = (torch.from_numpy(golden[k]) for k in ("x", "logsnr", "y", "out"))
    label = None if denoiser.num_classes is None else y.long()
    with torch.no_grad():
        ours = denoiser.network(x.movedim(-1, 1), timestep_of(logsnr), class_labels=label).sample.movedim(1, -1)
    assert (ours - out).norm() < 1e-4 * out.norm()


@pytest.mark.parametrize("name", ["x", "x_eps"])
def test_the_inferred_architecture_is_the_claimed_one(name):
    claimed = json.loads((DATA / f"official_unet_{name}.json").read_text())
    content = official._decode(DATA / f"official_unet_{name}.flax")
    inferred = infer_architecture(dict(official._flatten(content["ema_params"])))
    for ours, theirs in {
        "ch": "ch",
        "emb_ch": "emb_ch",
        "ch_mult": "ch_mult",
        "num_res_blocks": "num_res_blocks",
    }.items():
        assert inferred[ours] == claimed[theirs]
    assert (inferred["image_channels"], inferred["out_channels"]) == (claimed["in_channels"], claimed["out_ch"])
    levels = [claimed["image_size"].bit_length() - r.bit_length() for r in claimed["attn_resolutions"]]
    assert inferred["attn_levels"] == sorted(levels)
    assert inferred["num_classes"] == (claimed["num_classes"] if claimed["num_classes"] > 1 else None)
    assert inferred["head_dim"] == claimed.get("head_dim")


def test_command_line_writes_a_denoiser(tmp_path, monkeypatch, capsys):
    arguments = [str(DATA / "official_unet_x.flax"), str(tmp_path / "cifar"), "--image-size", "8"]
    monkeypatch.setattr("sys.argv", ["official", *arguments])
    official.main()
    assert "3x8x8, x, 8 steps" in capsys.readouterr().out
    images = sample(Denoiser.load(tmp_path / "cifar"), torch.randn(2, 3, 8, 8), 8)
    assert images.shape == (2, 3, 8, 8) and images.abs().max() <= 1


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_official_checkpoint(path, image_size=8)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pack(tree: object) -> bytes:
    """As Flax does: arrays as extension 1."""

    def encode(value: object) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb([value.shape, value.dtype.name, value.tobytes()]))

    return msgpack.packb(tree, default=encode)


def test_hostile_files_are_refused_and_take_no_memory(tmp_path):
    path = tmp_path / "file"
    arrays = dict(official._flatten(official._decode(DATA / "official_unet_x.flax")["ema_params"]))
    huge = msgpack.ExtType(1, msgpack.packb([[0, 0, 3, 2**40], "float32", b""]))
    wide = np.zeros((1, 1, 3, 2**16), np.float32)
    files = {
        "is damaged": [b"", WHOLE[:1000], WHOLE[:-1], WHOLE + b"x", b"\xdd\xff\xff\xff\xff", b"\x81" * 100_000],
        "no ema_params": [pack([1, 2]), pack({"step": 3}), pack({"ema_params": 3})],
        "empty array": [pack({"ema_params": {"conv_in/kernel": huge}})],
        "not a checkpoint": [
            pack({"ema_params": {}}),
            pack({"ema_params": {k: v for k, v in arrays.items() if k != "mid.block_1/conv1/bias"}}),
            pack({"ema_params": arrays | {"mid.block_9/conv1/bias": np.zeros(32, np.float32)}}),
            pack({"ema_params": arrays | {"conv_in/kernel": np.zeros((3, 3, 3, 64), np.float32)}}),
            pack({"ema_params": arrays | {"conv_in/kernel": wide}}),
            pack({"ema_params": arrays | {"down_0.block_999999999/conv1/kernel": wide}}),
            pack({"ema_params": {"a/kernel": "text"}}),
        ],
        "type 'object'": [pack({"ema_params": {"a": msgpack.ExtType(1, msgpack.packb([[1], "object", b"12345678"]))}})],
    }
    tracemalloc.start()
    for words, contents in files.items():
        for content in contents:
            path.write_bytes(content)
            assert words in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    assert "cannot be read" in refusal(tmp_path / "absent")


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_flipped_bytes_give_a_denoiser_or_a_line(tmp_path_factory, flips):
    damaged = bytearray(WHOLE)
    for position, value in flips:
        damaged[position] = value
    path = tmp_path_factory.mktemp("flipped") / "file"
    path.write_bytes(damaged)
    try:
        load_official_checkpoint(path, image_size=8)
    except UserError as error:
        assert "\n" not in str(error)


def test_older_shapes_of_the_same_size_are_reshaped(tmp_path):
    tree = official._decode(DATA / "official_unet_x.flax")["ema_params"]
    flat = dict(official._flatten(tree))
    older = {
        k: v.reshape(1, 1, *v.shape)
        if "nin_shortcut/kernel" in k
        else v.reshape(v.shape[0], -1)
        if "/q/kernel" in k
        else v
        for k, v in flat.items()
    }
    (tmp_path / "older").write_bytes(pack({"ema_params": older}))
    ours = load_official_checkpoint(tmp_path / "older", 8).network.state_dict()
    theirs = load_official_checkpoint(DATA / "official_unet_x.flax", 8).network.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
