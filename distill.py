"""Distil a teacher stage by stage: `python distill.py steps=demo`. Settings: conf/distill.yaml."""

from pdistill import cli


def main(cfg) -> None:
    from pdistill import report, run

    directory = run.directory_of(cfg)
    run.check_configuration(cfg, directory)
    if (directory / "summary.json").exists() and not cfg.overwrite:
        print(f"{directory} is finished; overwrite=true would run it again")
    else:
        from pdistill.stages import distill

        distill(cfg)
    report.show(directory)


if __name__ == "__main__":
    cli.run(main, "distill")
