"""`owner.json`: what the owner of a run needs to go on with it, and no record holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.driver.folder import RunFolder
from shoal.driver.lines import NodeHex
from shoal.driver.takeover import CannotTakeOver
from shoal.market.reputation import NEW
from shoal.training.commands import ShardFile

FILE = "owner.json"
TOKENIZER = "data/tokenizer"
"""Where the tokenizer is that went along with a run folder; else it is where its owner said."""

SEEN_MAX = 1024


class OwnerNotes(msgspec.Struct, frozen=True, kw_only=True):
    """What the model is measured on, and what was found before the first round."""

    tokenizer: str = "bytes"
    held_out: tuple[ShardFile, ...] = ()
    unigram_loss: float | None = None
    round_reason: str = ""
    round_trip_ms: float | None = None
    rate_bps: float | None = None
    script: str | None = None
    """Of the owner's own loop."""
    untrained_loss: float | None = None
    """As the script measured it."""
    seen: Annotated[dict[NodeHex, float], Meta(max_length=SEEN_MAX)] = {}
    """What its owner has seen of nodes, for who drives in its place: reputations, by NodeId."""

    @classmethod
    def read(cls, folder: RunFolder) -> OwnerNotes:
        """Raises FolderDamaged, and CannotTakeOver where there are none."""
        notes = folder.read(FILE, cls, remedy="restore it from a copy")
        if notes is None:
            raise CannotTakeOver(
                f"{folder.path / FILE} is missing, which says what the model is measured on and which tokenizer it "
                "has; restore it from a copy."
            )
        return notes

    def write(self, folder: RunFolder) -> None:
        folder.write(FILE, msgspec.json.encode(self))

    @property
    def scores(self) -> dict[bytes, float]:
        return {bytes.fromhex(node): score for node, score in self.seen.items()}

    @property
    def names_files(self) -> bool:
        """Outside of the run folder, on the owner's machine."""
        return self.script is not None or self.tokenizer not in ("bytes", TOKENIZER)

    def held_out_in(self, folder: RunFolder) -> tuple[ShardFile, ...]:
        """Where they are now: the folder may have been moved."""
        return tuple(
            ShardFile(str((folder.data / Path(shard.path).name).resolve()), shard.sequences) for shard in self.held_out
        )

    def tokenizer_in(self, folder: RunFolder) -> str:
        return str(folder.path / TOKENIZER) if self.tokenizer == TOKENIZER else self.tokenizer


def most_telling(scores: Mapping[bytes, float]) -> dict[str, float]:
    """As much of what was seen of nodes as goes into the notes: those first that are least like a new one."""
    chosen = sorted(scores, key=lambda node: -abs(scores[node] - NEW))[:SEEN_MAX]
    return {node.hex(): scores[node] for node in chosen}
