"""Pictures from a denoiser: `python sample.py denoiser=<dir> num_steps=4`. The same as `pdistill sample`."""

from pdistill.commands.cli import run

if __name__ == "__main__":
    run("sample")
