"""Train a teacher: `python train.py parameterization=v weighting=snr_plus_one`. Settings: conf/train.yaml."""

from pdistill import cli


def main(cfg) -> None:
    from pdistill.stages import train

    train(cfg)


if __name__ == "__main__":
    cli.run(main, "train")
