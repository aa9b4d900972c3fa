"""Quantizers by name."""

from foregate.errors import ForegateError
from foregate.quantize.base import Quantizer
from foregate.quantize.gptq import Gptq
from foregate.quantize.hqq import Hqq
from foregate.quantize.refit import Refit
from foregate.quantize.rtn import Rtn

QUANTIZERS: dict[str, type[Quantizer]] = {cls.name: cls for cls in (Rtn, Hqq, Refit, Gptq)}
DEFAULT = Refit.name


def quantizer(name: str = DEFAULT) -> Quantizer:
    """A quantizer by its name. Raises ForegateError for a name that none has."""
    if name not in QUANTIZERS:
        raise ForegateError(f"there is no quantizer {name!r}; choose one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]()
