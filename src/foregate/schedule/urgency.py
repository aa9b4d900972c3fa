"""Which record the link should bring first when not all can come in time: the one that waiting would cost more.

The exchange argument of scheduling by weighted tardiness: of two neighbours in a queue only their own lateness depends on
their order, so the one goes first that makes compute wait longer when it has to stand behind the other.
"""

from typing import NamedTuple


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
