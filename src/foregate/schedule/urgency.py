"""Which record the link should bring first when not all can come in time: the one that waiting would cost more.

The exchange argument of scheduling by weighted tardiness: of two neighbours in a queue only their own lateness depends on
their order, so the one goes first that makes compute wait longer when it has to stand behind the other.
"""

from typing import NamedTuple

import numpy as np

TIE = 1e-9  # seconds


class Need(NamedTuple):
    """A record that may be needed, and the seconds that matter."""

    chance: float  # that it is needed
    left: float  # of the link's work on it
    due: float  # until its layer runs

    def delayed(self, seconds: float) -> float:
        """Seconds that compute is expected to wait longer if the link comes to the record so much later."""
        end = self.left - self.due
        return self.chance * (max(end + seconds, 0.0) - max(end, 0.0))

    def goes_before(self, other: "Need") -> bool:
        """Whether it is worth more to bring this one first."""
        return self.delayed(other.left) > other.delayed(self.left)


def by_urgency(chance: np.ndarray, due: np.ndarray, load: float) -> np.ndarray:
    """The order of records that take `load` seconds each, by what another one before them would cost, most urgent last.

    As `Need.delayed`; where it is nothing, because there is time for both, the likelier one is the more urgent, then the
    earlier in the arrays. float [n] both; returns int [n].
    """
    delayed = chance * np.minimum(np.maximum(2 * load - due, 0.0), load)
    return np.argsort(-(delayed + TIE * chance), kind="stable")[::-1]
