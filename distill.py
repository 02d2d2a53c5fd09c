"""Distil a teacher stage by stage: `python distill.py steps=demo`. The same as `pdistill distill`."""

from pdistill.commands.cli import run

if __name__ == "__main__":
    run("distill")
