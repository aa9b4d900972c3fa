"""Places beside an obvious reference: a list of keys, least recently used first."""

from contextlib import ExitStack

import torch
from hypothesis import given
from hypothesis import strategies as st

from foregate.memory.places import Places

ROOM = 3
KEYS = st.tuples(st.just(0), st.integers(0, 5))
STEPS = st.tuples(st.sampled_from(["use", "keep", "find", "let go"]), KEYS)


@given(st.lists(STEPS, max_size=60))
def test_the_least_recently_used_that_is_not_in_use_makes_room(steps: list[tuple]) -> None:
    places, order, kept = Places([torch.empty(1)] * ROOM), [], []

    def expect_used(key: tuple[int, int]) -> None:
        if key in order:
            order.remove(key)
        elif len(order) == ROOM:
            order.remove(next(other for other in order if all(other != name for name, _ in kept)))
        order.append(key)

    with ExitStack() as at_the_end:
        for step, key in steps:
            if step == "let go" and kept:
                kept.pop()[1].close()
            elif step == "find":
                with places.find(key) as place:
                    assert (place is not None) == (key in order)
                if key in order:
                    expect_used(key)
            elif step in ("use", "keep") and (key in order or len({name for name, _ in kept}) < ROOM):
                expect_used(key)
                uses = at_the_end.enter_context(ExitStack())
                place = uses.enter_context(places.use(key))
                place.checked = True
                if step == "keep":
                    kept.append((key, uses))
                else:
                    uses.close()
            assert {(0, n) for n in range(6) if (0, n) in places} == set(order)


def test_a_place_knows_which_pieces_it_holds() -> None:
    places = Places([torch.empty(1)])
    with places.use((0, 0)) as place:
        place.pieces[8] = 8
        place.pieces[0] = 8
        assert place.holds(0, 8) and place.holds(8, 8) and not place.holds(16, 4)
        assert place.is_whole(16) and not place.is_whole(20)
        place.pieces[0] = 20  # read again, in one
        assert place.holds(16, 4) and place.is_whole(20)
    with places.use((0, 1)) as place:
        assert not place.pieces and not place.checked
