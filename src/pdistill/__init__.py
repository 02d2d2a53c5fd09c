"""Progressive distillation of diffusion models (Salimans & Ho, 2022) on Lightning and Hydra."""

__version__ = "0.1.0"
