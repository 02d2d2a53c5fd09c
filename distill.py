"""Distil a teacher stage by stage: `python distill.py steps=demo`. Settings: conf/distill.yaml."""

from pdistill import cli, report, run


def main(cfg) -> None:
    directory, finished = run.find(cfg, result="summary.json")
    if finished:
        print(f"{directory} is finished; overwrite=true would run it again")
    else:
        from pdistill.commands.stages import distill  # torch and its company: seconds that a finished run need not wait

        distill(cfg, directory)
    if run.is_main_process():
        report.show(directory)


if __name__ == "__main__":
    cli.run(main, "distill")
