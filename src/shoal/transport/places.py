"""Who makes way when places run short. Rules alone: keys cost nothing, so what counts is the address.

Many honest nodes may stand behind one address, so none of this bites while there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

CROWDED = 0.5
"""From so much of all places on, one source may hold no more than SHARE of them."""
SHARE = 0.25
RESERVE = 0.125
"""So much of all places is kept for links that this side opens itself."""


@dataclass(frozen=True)
class HeldLink:
    """A link that takes a place."""

    peer: bytes
    source: str
    wanted: bool
    """This side opened it, or asked for it."""
    idle_since: float | None
    """When it was last of use; none while a request is under way."""


def plenty(links: int, links_max: int) -> bool:
    """Whether one more link may come up whatever the others are: `room_for` admits it and has none make way."""
    return links < CROWDED * links_max


def room_for(source: str, wanted: bool, held: Sequence[HeldLink], links_max: int) -> tuple[bool, bytes | None]:
    """Whether one more link may come up, and which peer's has to make way for it.

    That is one that nobody uses: of the newcomer's own source when that has its share already, else of the source that
    holds most, and there the one idle for longest. A link that this side wants makes way only for another such.
    """
    strangers = [link for link in held if not link.wanted]
    per_source = Counter(link.source for link in strangers)
    if wanted:
        full, leaving = len(held) >= links_max, list(held)
    elif len(strangers) >= CROWDED * links_max and per_source[source] >= SHARE * links_max:
        full, leaving = True, [link for link in strangers if link.source == source]
    else:
        full = len(held) >= links_max or len(strangers) >= links_max - int(RESERVE * links_max)
        leaving = strangers
    if not full:
        return True, None
    idle = [(not link.wanted, per_source[link.source], -link.idle_since, link.peer)
            for link in leaving if link.idle_since is not None]  # fmt: skip
    return (True, max(idle)[-1]) if idle else (False, None)


def handshake_to_end(source: str, held: Sequence[tuple[str, float]], now: float, grace_s: float) -> int | None:
    """Which of the handshakes under way, oldest first as (source, begun), makes way for one more; none: it for them.

    It is the oldest of the source that holds most. Where that holds no more than the newcomer's would, as in a flood
    from many addresses or behind one, each has `grace_s` to end in peace and newcomers are turned away meanwhile: if
    the oldest always went, a fast flood would end every handshake before an honest one a slow path away had its turn,
    while so each call has the chance of places to callers, and once in, is through.
    """
    per_source = Counter(from_there for from_there, _ in held)
    most = max(per_source, key=per_source.__getitem__)  # of several the first, which has the oldest
    oldest = next(index for index, (from_there, _) in enumerate(held) if from_there == most)
    outnumbered = per_source[most] > per_source[source] + 1
    return oldest if outnumbered or now - held[oldest][1] >= grace_s else None
