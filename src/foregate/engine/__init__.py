"""Engines: they run a model's MoE layers, one at a time, with the experts in slots."""

from foregate.engine.base import Engine
from foregate.engine.host import HostEngine

__all__ = ["Engine", "HostEngine"]
