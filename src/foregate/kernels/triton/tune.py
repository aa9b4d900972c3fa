"""Finding configurations on the user's own card; `configs.candidates` then prefers them."""

from collections.abc import Callable, Iterable, Iterator

import torch

from foregate.errors import ForegateError
from foregate.kernels.slots.base import Rows
from foregate.kernels.triton.configs import Config, Decode, Grouped, key
from foregate.kernels.triton.kernel import TritonKernel
from foregate.kernels.triton.record import MatrixPlace, record_places

Measure = Callable[[Callable[[], None]], float]  # how long a call takes, in any unit
THREAD_BYTES = (16, 64)  # of weights that a thread loads in a step: fewer starve memory, more fill the registers


def tune(
    kernel: TritonKernel, hidden: torch.Tensor, choices: list[torch.Tensor], measure: Measure, grouped: bool
) -> dict[str, Config]:
    """The fastest configurations of both matrices by name (`configs.key`); the kernel uses them from then on.

    hidden: [tokens, hidden] as the model will have them. choices: slots, int32 [tokens, k] each, computed one after the
    other in a measured call: their records together should exceed the card's cache. grouped: for prompts, else for
    decode. Matrices are tuned one after the other. Raises ForegateError when the card refuses every configuration.
    """
    places = record_places(kernel.layout)
    call, kind = _call(kernel, hidden, choices, grouped), Grouped if grouped else Decode
    chosen = kernel.chosen(kind)
    if chosen is None:
        raise ForegateError(f"there is nothing to tune: {kernel.note}")
    up, down = chosen
    ups = grouped_space() if grouped else decode_space(places.up)
    pairs = ((config, _with_tokens(down, config)) for config in ups)
    up, down = _fastest(kernel, kind, pairs, call, measure)
    downs = grouped_space() if grouped else decode_space(places.down, apart=True)
    pairs = ((up, _with_tokens(config, up)) for config in downs)
    up, down = _fastest(kernel, kind, pairs, call, measure)
    kernel.use(kind, up, down)
    return {key(kind, places.up): up, key(kind, places.down): down}


def decode_space(matrix: MatrixPlace, apart: bool = False) -> Iterator[Decode]:
    """Configurations worth trying for a matrix. apart: also with the experts' results summed by a launch of its own."""
    least, most = THREAD_BYTES
    for rows in (4, 8, 16):
        for wide in (2, 4, 8, 16, 32):
            for warps in (1, 2, 4, 8):
                if least <= rows * wide * (64 // matrix.parts) / (32 * warps) <= most:
                    for stages in (1, 3):
                        yield from (Decode(rows, wide, warps, stages, way) for way in {False, apart})


def grouped_space() -> Iterator[Grouped]:
    """Configurations worth trying for prompts."""
    for tokens in (16, 32, 64, 128):
        for rows in (32, 64, 128):
            for warps in (4, 8):
                yield from (Grouped(tokens, rows, warps, stages) for stages in (1, 2, 3))


def _call(kernel: TritonKernel, hidden: torch.Tensor, choices: list[torch.Tensor], grouped: bool) -> Callable[[], None]:
    tokens, top_k = choices[0].shape
    places = torch.arange(tokens * top_k, dtype=torch.int32, device=hidden.device)
    outputs = torch.empty(tokens * top_k, hidden.shape[1], device=hidden.device)
    weights, total = torch.ones(tokens, top_k, device=hidden.device), torch.empty_like(hidden)

    def call() -> None:
        for slots in choices:
            if grouped:
                kernel.run(hidden, Rows(slots.view(-1), places // top_k, places), outputs, grouped=True)
            else:
                kernel.decode(hidden, slots, weights, total)

    return call


def _fastest(
    kernel: TritonKernel,
    kind: type[Config],
    pairs: Iterable[tuple[Config, Config]],
    call: Callable[[], None],
    measure: Measure,
) -> tuple[Config, Config]:
    best: tuple[float, tuple[Config, Config]] | None = None
    for pair in pairs:
        kernel.use(kind, *pair)
        call()
        if kernel.chosen(kind) is None:  # refused
            continue
        taken = measure(call)
        if best is None or taken < best[0]:
            best = (taken, pair)
    if best is None:
        raise ForegateError(f"no configuration could be tuned: {kernel.note}")
    return best[1]


def _with_tokens(config: Config, first: Config) -> Config:
    """Both matrices of a tile have the same tokens."""
    if isinstance(config, Grouped) and isinstance(first, Grouped):
        return Grouped(first.tokens, config.rows, config.warps, config.stages)
    return config
