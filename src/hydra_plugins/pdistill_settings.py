"""Hydra imports its plugins before it composes: this one makes the settings of pdistill's commands known to it."""

import pdistill.commands.settings  # noqa: F401
