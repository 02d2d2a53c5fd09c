"""Two processes keep one set of weights."""

import os
import subprocess
import sys

SCRIPT = """
import hashlib, sys, torch
from lightning import Trainer
from pdistill.dataset.batches import ImageDataModule
from pdistill.dataset import digits
from pdistill.denoiser import Denoiser
from pdistill.training.distillation import DistillationModule
from pdistill.network import unet
from pdistill.parameterization import V
from pdistill.schedule import CosineSchedule
from pdistill.weighting import snr_plus_one

torch.manual_seed(int(__import__("os").environ.get("LOCAL_RANK", 0)))  # another start on each rank
teacher = Denoiser(unet(8, 1, 1, 32, 64, [1], 1, []), V(), CosineSchedule())
torch.nn.init.normal_(teacher.network.conv_out.weight)
module = DistillationModule(teacher, 4, snr_plus_one, updates=5, learning_rate=1e-2, ema_decay=0.5)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=5, max_epochs=-1, logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False)
trainer.fit(module, ImageDataModule(digits(), 8, seed=0, stage=1))
digest = hashlib.sha256()
for name, value in module.state_dict().items():
    digest.update(value.numpy())
open(f"{sys.argv[1]}/rank-{trainer.global_rank}", "w").write(digest.hexdigest())
"""


def test_ranks_stay_identical(tmp_path):
    (tmp_path / "fit.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    subprocess.run([sys.executable, "fit.py", str(tmp_path)], cwd=tmp_path, env=environment, check=True, timeout=120)
    first, second = (path.read_text() for path in sorted(tmp_path.glob("rank-*")))
    assert first == second
