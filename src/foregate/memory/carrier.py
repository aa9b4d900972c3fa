"""What moves bytes for a link: the contract between the link, which knows when, and a carrier, which knows how."""

from typing import Protocol

from foregate.checkpoint.store import ExpertKey


class Carrier(Protocol):
    """Moves pieces of records into the slots it was made with. The link's threads call it, several at a time."""

    chunk_bytes: int  # of the largest piece, a multiple of 4096: what is more urgent waits for one
    path: str  # the way the bytes take, for the report: "direct", "buffered", "pinned" ...

    def carry(self, key: ExpertKey, slot: int, start: int, nbytes: int) -> None:
        """Bring bytes start .. start + nbytes of a record to the same place in the slot; blocks until they are there.

        The GIL is free while it waits. Raises ForegateError, which names the record, when the bytes cannot be had.
        """

    def check(self, key: ExpertKey, slot: int) -> None:
        """Make sure that the record in the slot, all of whose pieces have come, is the one that was converted.

        Raises ForegateError, which names the record, if it is not.
        """

    def close(self) -> None:
        """Let go of what was opened; nothing may be under way."""
