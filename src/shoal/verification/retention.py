"""How long a member keeps its private states, so that replays can start from them."""

from __future__ import annotations

from shoal.protocol.blobs import BlobRef


class Retention:
    """The private states that one member keeps: those of its last `rounds` rounds, of `bytes_max` together, and the
    newest whatever its size."""

    def __init__(self, rounds: int, bytes_max: float) -> None:
        self._rounds, self._bytes_max = rounds, bytes_max
        self._kept: list[tuple[int, BlobRef]] = []

    @property
    def kept(self) -> list[BlobRef]:
        """The oldest first."""
        return [ref for _, ref in self._kept]

    def advance(self, round_number: int, snapshot: BlobRef | None) -> list[BlobRef]:
        """The member's work of this round counts, and left a snapshot or none; gives what may be let go."""
        if snapshot is not None:
            self._kept.append((round_number, snapshot))
        gone = []
        while self._kept and (
            self._kept[0][0] < round_number - self._rounds
            or (len(self._kept) > 1 and sum(ref.size for ref in self.kept) > self._bytes_max)
        ):
            gone.append(self._kept.pop(0)[1])
        return gone
