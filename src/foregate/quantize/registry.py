"""Quantizers by name."""

from foregate.errors import ForegateError
from foregate.quantize.base import Quantizer
from foregate.quantize.gptq import Gptq
from foregate.quantize.hqq import Hqq
from foregate.quantize.refit import Refit
from foregate.quantize.rtn import Rtn

QUANTIZERS: dict[str, type[Quantizer]] = {cls.name: cls for cls in (Rtn, Hqq, Refit, Gptq)}
UNCALIBRATED, CALIBRATED = Refit.name, Gptq.name  # the best without and with a trace


def quantizer(name: str) -> Quantizer:
    """A quantizer by its name. Raises ForegateError for a name that none has."""
    if name not in QUANTIZERS:
        raise ForegateError(f"there is no quantizer {name!r}; choose one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]()


def choose_quantizer(name: str | None, calibrated: bool) -> Quantizer:
    """A quantizer by its name, None for the best, with or without inputs to calibrate it.

    Raises ForegateError for one that ignores the inputs there are, or lacks those it needs.
    """
    if name is None:
        name = CALIBRATED if calibrated else UNCALIBRATED
    chosen = quantizer(name)
    if chosen.needs_inputs and not calibrated:
        raise ForegateError(f"the quantizer {name} needs real inputs: record them with foregate trace and name --trace")
    if calibrated and not chosen.uses_inputs:
        using = " or ".join(key for key, cls in QUANTIZERS.items() if cls.uses_inputs)
        raise ForegateError(f"the quantizer {name} makes no use of --trace: choose {using}, or leave the trace out")
    return chosen
