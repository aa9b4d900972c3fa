"""Foregate runs Mixture-of-Experts language models that are larger than the memory you have.

foregate.convert("path/to/checkpoint", "model.store")
model = foregate.load("model.store", memory="25%")    # an ordinary transformers model
"""

from typing import TYPE_CHECKING, Any

from foregate.errors import ForegateError

if TYPE_CHECKING:
    from foregate.checkpoint.convert import convert
    from foregate.checkpoint.verify import verify
    from foregate.lookahead.align import align
    from foregate.lookahead.evaluate import evaluate_gates
    from foregate.model.loading import load
    from foregate.planner.plan import Plan, plan

__version__ = "0.1.0"
__all__ = ["ForegateError", "Plan", "__version__", "align", "convert", "evaluate_gates", "load", "plan", "verify"]

_HOMES = {
    "Plan": "planner.plan",
    "align": "lookahead.align",
    "convert": "checkpoint.convert",
    "evaluate_gates": "lookahead.evaluate",
    "load": "model.loading",
    "plan": "planner.plan",
    "verify": "checkpoint.verify",
}


def __getattr__(name: str) -> Any:
    """Import the heavy parts (torch, transformers) only when they are used."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
