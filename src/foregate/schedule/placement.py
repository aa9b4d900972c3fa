"""Placement: whether a missed expert is computed on the device after its transfer, or on the host, where its record lies.

The link works off one record after the other, the host one expert after the other, both at once. A layer's misses are
divided so that the later of the two is done as early as possible. Neither torch nor a clock: times are estimates,
measured when the model was loaded and corrected by what happened since.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from foregate.schedule.base import ExpertKey
from foregate.schedule.estimates import Average

TRUST = 8  # observations that the measurement at the start counts as
SURPRISE = 4.0  # times the estimate: what took longer was disturbed, and counts as this
RETRY = 256  # divisions that gave the host nothing, after which what was observed of it is forgotten


@dataclass(frozen=True)
class Costs:
    """Seconds, as measured once."""

    load: float  # of a record over the link, to the end
    device: float  # an expert on the device, once its record is there
    host: float  # an expert on the host, for one token
    host_token: float  # for each further token


class Placement:
    """Divides misses. `reserve(key)` is asked for every expert that the host is to compute: whether its record lies in
    host memory and stays there until the expert was computed.
    """

    def __init__(self, costs: Costs, reserve: Callable[[ExpertKey], bool]) -> None:
        self._costs, self._reserve = costs, reserve
        self._load, self._pace = _started(costs.load), _started(1.0)  # pace: seconds the host took, by those foretold
        self._idle = 0  # divisions since the host had something to do

    @property
    def load_seconds(self) -> float:
        """Of a whole record over the link."""
        return self._load.value

    def host_seconds(self, tokens: float) -> float:
        """Of one expert for so many tokens on the host."""
        return self._foretold(tokens) * self._pace.value

    def loaded(self, seconds: float) -> None:
        """A record has come; the link worked `seconds` on it."""
        self._load.add(min(seconds, SURPRISE * self.load_seconds))

    def computed(self, experts: int, tokens: float, seconds: float) -> None:
        """The host has computed so many experts, each for so many tokens on average."""
        pace = seconds / (experts * self._foretold(tokens))
        self._pace.add(min(pace, SURPRISE * self._pace.value))

    def split(self, misses: Mapping[ExpertKey, float], tokens: float) -> list[ExpertKey]:
        """Those of the misses that the host is to compute.

        misses: seconds of link time that each still takes, in the order in which they are worth loading, for later too.
        tokens: that an expert has on average. An expert goes to the host while that is done with it, and with all it has
        got before, sooner than the link with what it has left; the costliest for the link first.
        """
        link, host = sum(misses.values()) + self._costs.device, 0.0
        each = self.host_seconds(tokens)
        chosen: list[ExpertKey] = []
        for key in sorted(reversed(misses), key=lambda key: -misses[key]):
            if host + each >= link:
                break
            if misses[key] > 0 and self._reserve(key):
                chosen.append(key)
                link, host = link - misses[key], host + each
        self._idle = 0 if chosen else self._idle + 1
        if self._idle == RETRY:
            self._pace, self._idle = _started(1.0), 0
        return chosen

    def facts(self) -> dict[str, Any]:
        """The estimates as they are now, in seconds."""
        return {
            "load_seconds": self.load_seconds,
            "host_seconds": self.host_seconds(1),
            "device_seconds": self._costs.device,
        }

    def _foretold(self, tokens: float) -> float:
        return self._costs.host + self._costs.host_token * max(tokens - 1.0, 0.0)


def _started(value: float) -> Average:
    average = Average()
    for _ in range(TRUST):
        average.add(value)
    return average
