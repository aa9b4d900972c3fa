"""Quantizers: `quantizer("refit").quantize(weight, bits=4)` makes a `QuantizedMatrix` of a weight matrix."""

from foregate.quantize.base import Quantizer
from foregate.quantize.gptq import Gptq
from foregate.quantize.hqq import Hqq
from foregate.quantize.refit import Refit
from foregate.quantize.registry import QUANTIZERS, choose_quantizer, quantizer
from foregate.quantize.rtn import Rtn

__all__ = ["QUANTIZERS", "Gptq", "Hqq", "Quantizer", "Refit", "Rtn", "choose_quantizer", "quantizer"]
