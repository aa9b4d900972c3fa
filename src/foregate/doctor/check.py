"""One thing that was looked at."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "slow", "broken"]


@dataclass(frozen=True)
class Check:
    """What was found. state: "ok"; "slow", it works, but not at its best; "broken", Foregate cannot be used so."""

    topic: str  # machine, versions, kernels, speed, storage, limits, self-test
    name: str
    state: State
    found: str
    mend: str = ""  # one sentence, for all that is not ok
