"""Checkpoints: written, read, and kept for a run. Here is what goes beyond :mod:`aiostage` itself."""

from aiostage.checkpoint.save import convert
from aiostage.format.classes import PlainObject
from aiostage.format.registry import register

__all__ = ["PlainObject", "convert", "register"]
