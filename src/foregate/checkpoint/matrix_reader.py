"""Streams the matrices of a backbone out of any checkpoint layout, one at a time, through transformers' conversions."""

from collections import defaultdict

import torch

from foregate.checkpoint.architecture import BackboneMatrices
from foregate.checkpoint.expert_reader import ExpertReader
from foregate.errors import ForegateError, first_line


class MatrixReader:
    """Sorts a checkpoint's backbone into matrices to quantize and the rest, and reads the matrices one by one.

    A checkpoint tensor belongs to the rest if any parameter that it becomes does.
    """

    def __init__(self, reader: ExpertReader, wanted: BackboneMatrices) -> None:
        self._reader, self._checkpoint = reader, reader.checkpoint
        keys: dict[str, list[str]] = defaultdict(list)  # parameter -> checkpoint keys that make it
        for key, place in reader.places.items():
            for target in reader.targets(*place):
                keys[target].append(key)
        self._sources = {module: keys[f"{module}.weight"] for module in wanted.shapes}
        self.shapes = {module: shape for module, shape in wanted.shapes.items() if self._is_separate(module, wanted)}
        self.kept = tuple(sorted({*wanted.kept, *(wanted.shapes.keys() - self.shapes.keys())}))
        used = {key for module in self.shapes for key in self._sources[module]}
        self.rest = [key for key in reader.backbone if key not in used]

    def read(self, module: str) -> torch.Tensor:
        """The weight of a linear module, [out, in], in the checkpoint's own dtype.

        Raises ForegateError when the checkpoint's tensors do not make a weight of the right shape.
        """
        tensor = self._convert(module)
        if tuple(tensor.shape) != self.shapes[module]:
            raise ForegateError(
                f"{self._checkpoint.path}: {module}.weight has shape {tuple(tensor.shape)} where config.json asks for "
                f"{self.shapes[module]}: weights and configuration do not belong together"
            )
        return tensor

    def _is_separate(self, module: str, wanted: BackboneMatrices) -> bool:
        """Whether the tensors of this weight make nothing but weights that are wanted too."""
        places = [self._reader.places[key] for key in self._sources[module]]
        made = {name for place in places for name in self._reader.targets(*place)}
        plain = all(pattern is None for _, pattern in places)
        return made <= {f"{name}.weight" for name in wanted.shapes} and (len(places) == 1 or not plain)

    def _convert(self, module: str) -> torch.Tensor:
        keys, tensors = self._sources[module], self._checkpoint.tensors
        target, pattern = self._reader.places[keys[0]]
        if pattern is None:
            return tensors[keys[0]].read()
        converter = self._reader.converter(pattern)
        for key in keys:
            converter.add_tensor(target, key, self._reader.places[key][1], tensors[key].read())
        model = self._reader.architecture.model
        try:
            converted = converter.convert(target, model=model, config=model.config)[f"{module}.weight"]
        except (RuntimeError, ValueError, KeyError) as error:
            raise ForegateError(
                f"{self._checkpoint.path}: {module}.weight does not convert: {first_line(error)}"
            ) from None
        return converted[0] if isinstance(converted, list) else converted
