"""Train a teacher: `python train.py parameterization=v weighting=snr_plus_one`. The same as `pdistill train`."""

from pdistill.commands.cli import run

if __name__ == "__main__":
    run("train")
