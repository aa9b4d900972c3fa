"""Quantizers: `quantizer("refit").quantize(weight, bits=4)` makes a `QuantizedMatrix` of a weight matrix."""

from foregate.quantize.base import Quantizer
from foregate.quantize.gptq import Gptq
from foregate.quantize.hqq import Hqq
from foregate.quantize.refit import Refit
from foregate.quantize.registry import DEFAULT, QUANTIZERS, quantizer
from foregate.quantize.rtn import Rtn

__all__ = ["DEFAULT", "QUANTIZERS", "Gptq", "Hqq", "Quantizer", "Refit", "Rtn", "quantizer"]
