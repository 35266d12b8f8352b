"""Trainings here run on the CPU."""

from tests.training.conftest import on_the_cpu

__all__ = ["on_the_cpu"]
