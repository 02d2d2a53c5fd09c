"""Train a teacher: `python train.py parameterization=v weighting=snr_plus_one`. Settings: conf/train.yaml."""

from pdistill import cli, run


def main(cfg) -> None:
    directory, finished = run.find(cfg, result="teacher/metrics.json")
    if finished:
        print(f"{directory} is finished; overwrite=true would run it again")
    else:
        from pdistill.commands.stages import train

        train(cfg, directory)
    if run.is_main_process():
        print((directory / "teacher" / "metrics.json").read_text() + f"teacher: {directory / 'teacher' / 'denoiser'}")


if __name__ == "__main__":
    cli.run(main, "train")
