"""The cheapest gang of a size in which any two members are near enough to one another.

That is finding the cheapest clique of a size, for which no method is quick on every input. Around each of the cheapest
candidates there is a ball in which any two are near to one another; the cheapest gangs of such balls are improved by
exchanging members. The rest of the work goes into a search: each candidate in turn is taken for the cheapest of its
gang, which then costs at least what its cheapest neighbours do, and what cannot become cheaper is left out (branch and
bound). It ends after a fixed number of steps, and the answer says how much cheaper another gang could be at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PREFIX = 16_384
"""So many of the cheapest are looked at first; all, if there is no gang of those."""
SEEDS_MAX = 320
"""Members that are taken for the cheapest of a gang."""
NEIGHBOURS = 160
"""Cheapest neighbours of a member that are searched."""
BALL_AMONG = 1_280
"""Who is near to a member, of whom so many make a ball or none do."""
BLOCK = 128
"""Candidates of one product of matrices: so few that no library uses several threads for it, which costs more than they
save."""
LOOK_FIRST, LOOK_MAX = 2, 16
"""Blocks in which those near to the members are looked for at a time: first, and at most."""
ROUNDING = 2e-6
"""What single precision is off at most, in parts of the squares that are added up: 8 roundings of 2**-24, of sums that
are up to twice as large, make half of it."""
TRIED = 12
"""Most promising gangs that are improved."""
STEPS_MAX, STEPS_OF_SEED, STEPS_FEW = 3_000, 600, 300
"""Of the search in all, of that for the gangs that one member is the cheapest of, and in all where there are more
candidates than SEEDS_MAX: then it seldom proves anything, and exchanging members has found what it would find."""
NEVER = 1 << 62


@dataclass(frozen=True)
class Gang:
    """The members of a gang, as places in what was given; none where none was found."""

    members: tuple[int, ...]
    cost: int
    at_least: int
    """No gang of the size costs less; as `cost` where it is proved to be the cheapest."""
    reason: str

    @property
    def proved(self) -> bool:
        return self.cost <= self.at_least


def cheapest_gang(
    costs: NDArray[np.int64],
    positions_ms: NDArray[np.float64],
    heights_ms: NDArray[np.float64],
    *,
    size: int,
    latency_max_ms: float,
) -> Gang:
    """`size` >= 2 of the candidates whose costs, positions [n, DIMENSIONS] and heights are given, any two of them at
    most `latency_max_ms` apart, for as little as is found."""
    candidates = len(costs)
    said = f"{size} of {candidates} candidates within {latency_max_ms:g} ms of one another"
    if candidates < size:
        return Gang((), 0, NEVER, f"There are only {candidates} candidates for a gang of {size}.")
    for prefix in dict.fromkeys((min(PREFIX, candidates), candidates)):
        chosen = _cheapest(costs, prefix)
        search = _Search(costs[chosen], positions_ms[chosen], heights_ms[chosen], size, latency_max_ms)
        search.run()
        if search.members:
            break
    at_least = search.at_least
    if prefix < candidates:  # a gang with somebody from outside
        at_least = min(at_least, int(search.costs[: size - 1].sum()) + int(search.costs[-1]))
    if not search.members:
        far = "There are no" if at_least == NEVER else "Not found:"
        return Gang((), 0, at_least, f"{far} {said}.")
    at_least = min(at_least, search.cost)
    if at_least == search.cost:
        reason = f"{said}; none are cheaper."
    else:
        reason = f"{said}; others could be {100 * (1 - at_least / search.cost):.1f} % cheaper at most."
    return Gang(tuple(int(chosen[at]) for at in search.members), search.cost, at_least, reason)


def _cheapest(costs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The places of so many of the cheapest, in their order; of equal ones the earlier first."""
    if count == len(costs):
        return np.argsort(costs, kind="stable")
    limit = np.partition(costs, count - 1)[count - 1]
    among = np.flatnonzero(costs <= limit)
    return among[np.argsort(costs[among], kind="stable")][:count]


class _Search:
    """Among candidates that are sorted by cost."""

    def __init__(
        self,
        costs: NDArray[np.int64],
        positions: NDArray[np.float64],
        heights: NDArray[np.float64],
        size: int,
        limit_ms: float,
    ) -> None:
        self.costs, self._positions, self._heights = costs, positions, heights
        self._size, self._limit = size, limit_ms
        self._steps = STEPS_MAX if len(costs) <= SEEDS_MAX else STEPS_FEW
        self.members: tuple[int, ...] = ()
        self.cost = NEVER
        self.at_least = NEVER
        """Of gangs that were not looked at."""

    def run(self) -> None:
        seeds = min(SEEDS_MAX, len(self.costs))
        if seeds < len(self.costs):
            self.at_least = int(self.costs[seeds]) * self._size
        self._near, self._balls = self._surroundings(seeds)
        ball_costs = self._balls.cost_of_first(self._size, self.costs)
        for seed in np.argsort(ball_costs, kind="stable")[:TRIED].tolist():
            if ball_costs[seed] < NEVER:
                self._improve(seed)
        at_least = self._near.cost_of_first(self._size - 1, self.costs)
        at_least = np.minimum(at_least + self.costs[:seeds], NEVER)
        for seed in np.argsort(at_least, kind="stable").tolist():
            if at_least[seed] >= self.cost:
                break
            if self._steps <= 0 or not self._all_of(seed):
                self.at_least = min(self.at_least, int(at_least[seed]))

    # --- members and those around them -------------------------------------------------------------------------------

    def _surroundings(self, seeds: int) -> tuple[_Around, _Around]:
        """Of each seed: who comes after it and is near to it, more than NEIGHBOURS, and a gang of who is so near that
        any two are near to one another; all there are where they are fewer."""
        nears, balls = np.zeros(seeds, dtype=np.int64), np.zeros(seeds, dtype=np.int64)
        near_pairs, ball_pairs = [], []
        maybe_near = self._maybe_near(seeds)
        begin, lacking = 0, np.arange(seeds)
        while begin * BLOCK < len(self.costs) and len(lacking):
            end = min(max(LOOK_FIRST, 2 * begin), begin + LOOK_MAX)
            mine, theirs = pairs = maybe_near(lacking, slice(begin, end))
            apart = self._positions[mine] - self._positions[theirs]
            reach = np.sqrt(np.einsum("ij,ij->i", apart, apart)) + self._heights[theirs]
            near = reach + self._heights[mine] <= self._limit
            near_pairs.append(pairs[:, near & (theirs > mine)])
            ball_pairs.append(pairs[:, near & (2 * reach <= self._limit)])
            nears += np.bincount(near_pairs[-1][0], minlength=seeds)
            balls += np.bincount(ball_pairs[-1][0], minlength=seeds)
            few = max(NEIGHBOURS, self._size)
            lacking = np.flatnonzero((nears <= few) | ((balls < self._size) & (nears <= BALL_AMONG)))
            begin = end
        return _Around.of(near_pairs, nears), _Around.of(ball_pairs, balls)

    def _maybe_near(self, seeds: int) -> Callable[[NDArray[np.int64], slice], NDArray[np.int64]]:
        """(some seeds, some blocks) -> pairs [2, ...] of who is near, with a few who are nearly so. A distance is at
        most what the heights leave of the limit, and so are the squares: a sum of products, which a product of matrices
        has for all pairs, in single precision."""
        room, squares = self._limit - self._heights, np.square(self._positions).sum(axis=1)
        ones, less, more = np.ones(len(room)), 1 - ROUNDING, 1 + ROUNDING
        mine = [less * squares - more * room**2, ones, *-2 * self._positions.T, 2 * room]
        theirs = [ones, less * squares - more * self._heights**2, *self._positions.T, self._heights]
        missing = -len(room) % BLOCK
        left = np.array(mine, dtype=np.float32).T[:seeds]
        right = np.pad(np.array(theirs, dtype=np.float32), ((0, 0), (0, missing)))
        right = right.reshape(len(theirs), -1, BLOCK).transpose(1, 0, 2)
        heights = np.pad(self._heights, (0, missing), constant_values=np.inf).reshape(-1, 1, BLOCK)

        def among(some: NDArray[np.int64], blocks: slice) -> NDArray[np.int64]:
            beyond = left[some] @ right[blocks]
            found = np.flatnonzero((beyond <= 0) & (heights[blocks] <= room[some][:, None]))
            block, seed, at = np.unravel_index(found, beyond.shape)
            return np.stack([some[seed], (blocks.start + block) * BLOCK + at])

        return among

    def _pairs(self, some: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[some, some]: whether they are near enough."""
        room = self._limit - np.add.outer(self._heights[some], self._heights[some])
        apart = sum(np.square(np.subtract.outer(axis, axis)) for axis in self._positions[some].T)
        return np.asarray((room >= 0) & (apart <= room * room))

    # --- a gang at once ----------------------------------------------------------------------------------------------

    def _improve(self, seed: int) -> None:
        """The gang around a member; its members are exchanged one by one as long as that makes it cheaper."""
        ball = self._balls[seed][: self._size]
        some = np.union1d(ball, self._near[seed][:NEIGHBOURS])
        near, costs = self._pairs(some), self.costs[some]
        inside = np.zeros(len(some), dtype=bool)
        inside[np.searchsorted(some, ball)] = True
        while True:
            # For whom somebody outside could come: who is near to all others of the gang.
            away = self._size - near[inside].sum(axis=0)
            exchange = _exchange(near, costs, inside, away)
            if exchange is None:
                break
            leaves, comes = exchange
            inside[leaves], inside[comes] = False, True
        self._take(some[inside])

    def _take(self, members: NDArray[np.int64]) -> None:
        cost = int(self.costs[members].sum())
        if cost < self.cost:
            self.cost, self.members = cost, tuple(members.tolist())

    # --- all gangs of a member ---------------------------------------------------------------------------------------

    def _all_of(self, seed: int) -> bool:
        """Look for a cheaper one among all; gives whether all were looked at."""
        neighbours, further = np.split(self._near[seed], [NEIGHBOURS])
        own = int(self.costs[seed])
        if len(further):
            # What a gang costs with somebody who is not looked at.
            beyond = own + int(self.costs[neighbours[: self._size - 2]].sum()) + int(self.costs[further[0]])
            self.at_least = min(self.at_least, beyond)
        near = _bits(self._pairs(neighbours))
        costs = self.costs[neighbours].tolist()
        until = max(0, self._steps - STEPS_OF_SEED)

        def go(missing: int, open_ones: int, cost: int, chosen: tuple[int, ...]) -> bool:
            if missing == 0:
                self._take(np.array([seed, *neighbours[list(chosen)].tolist()]))
                return True
            whole = True
            while open_ones.bit_count() >= missing:
                if cost + _least(costs, open_ones, missing) >= self.cost:
                    return whole
                if self._steps <= until:
                    return False
                self._steps -= 1
                lowest = open_ones & -open_ones
                at = lowest.bit_length() - 1
                open_ones ^= lowest
                whole &= go(missing - 1, open_ones & near[at], cost + costs[at], (*chosen, at))
            return whole

        return go(self._size - 1, (1 << len(costs)) - 1, own, ())


@dataclass(frozen=True)
class _Around:
    """Candidates around each of the seeds, in their order."""

    members: NDArray[np.int64]
    """Seed after seed."""
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, pairs: list[NDArray[np.int64]], counts: NDArray[np.int64]) -> _Around:
        """Of pairs [2, ...] of seeds and candidates, so many of each seed."""
        seeds, members = np.concatenate(pairs, axis=1)
        return cls(members[np.argsort(seeds, kind="stable")], np.cumsum(counts))

    def __getitem__(self, seed: int) -> NDArray[np.int64]:
        return self.members[self.ends[seed - 1] if seed else 0 : self.ends[seed]]

    def cost_of_first(self, count: int, costs: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the first so many of each seed cost; NEVER where they are fewer."""
        begins = np.concatenate(([0], self.ends[:-1]))
        enough = self.ends - begins >= count
        total = np.concatenate(([0], np.cumsum(costs[self.members])))
        found = np.full(len(begins), NEVER)
        found[enough] = total[begins[enough] + count] - total[begins[enough]]
        return found


def _exchange(
    near: NDArray[np.bool_], costs: NDArray[np.int64], inside: NDArray[np.bool_], away: NDArray[np.int64]
) -> tuple[int, int] | None:
    """Who leaves and who comes, so that it becomes cheapest; none where nothing makes it cheaper."""
    members = np.flatnonzero(inside)
    outside = np.flatnonzero(~inside & (away <= 1) & (costs < costs[members[-1]]))
    if not len(outside):
        return None
    # In the place of the only one that somebody is not near to, or of the dearest.
    leaves = members[np.where(away[outside] == 0, -1, np.argmin(near[outside][:, members], axis=1))]
    saved = costs[leaves] - costs[outside]
    best = int(np.argmax(saved))
    return (int(leaves[best]), int(outside[best])) if saved[best] > 0 else None


def _bits(near: NDArray[np.bool_]) -> list[int]:
    """Of each row, the set of those that it is near to, as the bits of a number."""
    packed = np.packbits(near, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _least(costs: list[int], open_ones: int, count: int) -> int:
    """What so many of them cost at least; they are sorted."""
    total = 0
    for _ in range(count):
        lowest = open_ones & -open_ones
        total += costs[lowest.bit_length() - 1]
        open_ones ^= lowest
    return total


# --- by what was measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """Candidates of which any two are near enough, as places in what was given, and why not more."""

    members: tuple[int, ...]
    reason: str


def near_one_another(
    distances_ms: NDArray[np.float64], costs: NDArray[np.int64], *, limit_ms: float, at_least: int
) -> Near:
    """As many as are found of the candidates whose round trips were measured ([n, n], symmetric, infinite where nobody
    could say), any two at most `limit_ms` apart: whoever is too far from most is left out, of those alike the dearer.
    Where they are fewer than `at_least` the reason says at which limit they would be enough."""
    members = _near(distances_ms, costs, limit_ms)
    said = f"{len(members)} of {len(costs)} nodes are within {limit_ms:.4g} ms of one another"
    if len(members) >= at_least:
        return Near(members, f"{said}.")
    pairs = distances_ms[np.triu_indices(len(costs), 1)]
    further = np.unique(pairs[np.isfinite(pairs) & (pairs > limit_ms)])
    low, high = 0, len(further)  # more are near at a higher limit, as a rule: good enough for a piece of advice
    while low < high:
        middle = (low + high) // 2
        if len(_near(distances_ms, costs, float(further[middle]))) >= at_least:
            high = middle
        else:
            low = middle + 1
    would = "no limit would do"
    if low < len(further):
        enough = float(np.ceil(further[low] * 10) / 10)
        would = f"within {enough:.4g} ms {len(_near(distances_ms, costs, enough))} would be"
    return Near(members, f"{said}, and {at_least} are needed; {would}.")


def _near(distances_ms: NDArray[np.float64], costs: NDArray[np.int64], limit_ms: float) -> tuple[int, ...]:
    far = ~(distances_ms <= limit_ms)
    np.fill_diagonal(far, False)
    left = np.arange(len(costs))
    while len(left):
        many = far[np.ix_(left, left)].sum(axis=1)
        if not many.any():
            break
        left = np.delete(left, np.lexsort((left, costs[left], many))[-1])
    return tuple(int(one) for one in left)
