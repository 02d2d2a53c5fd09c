"""Pictures from a denoiser: `python sample.py denoiser=<dir> num_steps=4`. Settings: conf/sample.yaml."""

from pdistill import cli


def main(cfg) -> None:
    from pdistill.report.grids import draw

    print(f"wrote {draw(cfg)}")


if __name__ == "__main__":
    cli.run(main, "sample")
