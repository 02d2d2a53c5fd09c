"""Measure a denoiser: `python evaluate.py denoiser=<dir> steps=[1,2,4,8]`. Settings: conf/evaluate.yaml."""

import sys

from pdistill import cli, run


def main(cfg) -> None:
    from pdistill.commands.evaluate import evaluate, show

    file = evaluate(cfg)
    if run.is_main_process():
        show(file)


if __name__ == "__main__":
    # Hydra would take steps=[1,2] for a choice of the group conf/steps.
    sys.argv = [f"num_{word}" if word.startswith("steps=") else word for word in sys.argv]
    cli.run(main, "evaluate")
