"""Places beside an obvious reference: every request remembered, and added up anew for each record that has to go."""

from contextlib import ExitStack

import torch
from hypothesis import given
from hypothesis import strategies as st

from foregate.memory.places import HALF_LIFE, Places

ROOM = 3
KEYS = [(0, n) for n in range(6)]
STEPS = st.tuples(st.sampled_from(["use", "use", "keep", "ask", "let go"]), st.sampled_from(KEYS))


class Slow:
    """The reference."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []
        self.inside: set[tuple[int, int]] = set()

    def count(self, key: tuple[int, int]) -> float:
        ages = (len(self.requests) - when for when, other in enumerate(self.requests) if other == key)
        return sum(2 ** (-age / (HALF_LIFE * ROOM)) for age in ages)

    def use(self, key: tuple[int, int], kept: set[tuple[int, int]]) -> None:
        if key not in self.inside and len(self.inside) == ROOM:
            self.inside.remove(min(self.inside - kept, key=self.count))
        self.inside.add(key)


@given(st.lists(STEPS, max_size=80))
def test_the_least_often_asked_for_that_is_not_in_use_makes_room(steps: list[tuple]) -> None:
    places, slow = Places([torch.empty(1)] * ROOM), Slow()
    kept: list[tuple[tuple[int, int], ExitStack]] = []
    with ExitStack() as at_the_end:
        for step, key in steps:
            names = {name for name, _ in kept}
            if step == "let go" and kept:
                kept.pop()[1].close()
            if step in ("let go", "use", "keep") and (len(names | {key}) > ROOM or step == "let go"):
                continue
            places.asked(key)
            slow.requests.append(key)
            if step in ("use", "keep"):
                slow.use(key, names)
                uses = at_the_end.enter_context(ExitStack())
                uses.enter_context(places.use(key)).checked = True
                if step == "keep":
                    kept.append((key, uses))
                else:
                    uses.close()
            assert {key for key in KEYS if key in places} == slow.inside


def test_counting_goes_on_for_ever() -> None:
    places = Places([torch.empty(1)])
    for _ in range(20_000):  # thousands of half-lives
        places.asked((0, 1))
    for key in ((0, 0), (0, 1), (0, 0)):
        with places.use(key) as place:
            assert place.key == key


def test_a_place_knows_which_pieces_it_holds() -> None:
    places, page = Places([torch.empty(1)]), 4096
    with places.find((0, 0)) as place:
        assert place is None
    with places.use((0, 0)) as place:
        places.add(place, 0, 2 * page)
        places.add(place, page, 2 * page)  # however a record is cut
        places.add(place, 4 * page, page)
        assert place.holds(0, 3 * page) and place.holds(2 * page, page) and place.holds(4 * page, page)
        assert not place.holds(3 * page, page) and not place.holds(0, 5 * page)
        places.add(place, 0, 5 * page)
        assert place.holds(0, 5 * page) and not place.holds(0, 6 * page)
    with places.find((0, 0)) as found:
        assert found is place
    with places.use((0, 1)) as place:
        assert not place.holds(0, page) and not place.checked
