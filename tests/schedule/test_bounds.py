"""What the bounds know of a prediction's targets."""

import numpy as np
import pytest

from foregate.schedule import Prediction, Shape, make_scheduler

SHAPE = Shape((4, 4, 4), (1, 1, 1))
FUTURE = [(0, (1,)), (1, (2,)), (2, (3,)), (0, (0,)), (1, (1,))]


@pytest.mark.parametrize(
    ("policy", "tokens_to_come"), [("clairvoyant-horizon", True), ("clairvoyant-determined", False)]
)
def test_what_is_known_before_and_after_a_token_is_sampled(policy: str, tokens_to_come: bool) -> None:
    scheduler = make_scheduler(policy, 12, SHAPE, FUTURE)

    def expected(layer: int, *targets: int, token: bool = False) -> set[tuple[int, int]]:
        ahead = tuple((target, np.zeros(4)) for target in targets)
        scheduler.predicted(Prediction(layer, ahead, token=token))
        return set(scheduler.expected())

    def serve(layer: int, expert: int) -> None:
        scheduler.routed(layer, [expert])
        while (layer, expert) in scheduler.in_flight():
            scheduler.arrived((layer, expert))
        scheduler.computed([(layer, expert)])

    serve(0, 1)
    serve(1, 2)
    assert expected(1, 2, 0) == ({(2, 3), (0, 0)} if tokens_to_come else {(2, 3)})
    serve(2, 3)
    assert expected(2, 0, 1, token=True) == {(0, 0), (1, 1)}
