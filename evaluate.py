"""Measure a denoiser: `python evaluate.py denoiser=<dir> num_steps=[1,2,4,8]`. The same as `pdistill evaluate`."""

from pdistill.commands.cli import run

if __name__ == "__main__":
    run("evaluate")
