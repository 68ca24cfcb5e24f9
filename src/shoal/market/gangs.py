"""The cheapest gang of a size in which any two members are near enough to one another.

That is finding the cheapest clique of a size, for which no method is quick on every input. Around each of the cheapest
candidates there is a ball in which any two are near to one another; the cheapest gangs of such balls are improved by
exchanging members. The rest of the work goes into a search: each candidate in turn is taken for the cheapest of its
gang, which then costs at least what its cheapest neighbours do, and what cannot become cheaper is left out (branch and
bound). It ends after a fixed number of steps, and the answer says how much cheaper another gang could be at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PREFIX = 16_384
"""So many of the cheapest are looked at first; all, if there is no gang of those."""
SEEDS_MAX = 320
"""Members that are taken for the cheapest of a gang."""
NEIGHBOURS = 160
"""Cheapest neighbours of a member that are searched."""
CHUNK = 512
"""Candidates whose distance is found at a time."""
AT_ONCE = 64
"""Members that they are found for at a time."""
TRIED = 12
"""Most promising gangs that are improved."""
STEPS_MAX, STEPS_OF_SEED, STEPS_FEW = 3_000, 600, 300
"""Of the search in all, of that for the gangs that one member is the cheapest of, and in all where there are more
candidates than SEEDS_MAX: then it seldom proves anything, and exchanging members has found what it would find."""
KEY_PRIMES = (73_856_093, 19_349_663, 83_492_791)
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
        self._blocks = _Blocks(positions, heights, limit_ms)
        self._steps = STEPS_MAX if len(costs) <= SEEDS_MAX else STEPS_FEW
        self.members: tuple[int, ...] = ()
        self.cost = NEVER
        self.at_least = NEVER
        """Of gangs that were not looked at."""

    def run(self) -> None:
        seeds = np.arange(min(SEEDS_MAX, len(self.costs)))
        if len(seeds) < len(self.costs):
            self.at_least = int(self.costs[len(seeds)]) * self._size
        at_least, ball_costs = self._bounds(seeds)
        for seed in np.argsort(ball_costs, kind="stable")[:TRIED].tolist():
            if ball_costs[seed] < NEVER:
                self._improve(seed)
        for seed in np.argsort(at_least, kind="stable").tolist():
            if at_least[seed] >= self.cost:
                break
            if self._steps <= 0 or not self._all_of(seed):
                self.at_least = min(self.at_least, int(at_least[seed]))

    # --- members and those around them -------------------------------------------------------------------------------

    def _bounds(self, seeds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each: what a gang costs at least that it is the cheapest of, and what the cheapest gang of the ball around
        it costs; NEVER where there is none."""
        at_least, ball_costs = np.full(len(seeds), NEVER), np.full(len(seeds), NEVER)
        for block, group in self._blocks.groups(seeds):
            for begin in range(0, len(group), AT_ONCE):
                some = group[begin : begin + AT_ONCE]
                near, inside = self._from(some, block, slice(CHUNK))
                at_least[some] = self.costs[some] + _first(self.costs[block.members[:CHUNK]], near, self._size - 1)
                ball_costs[some] = _first(self.costs[block.members[:CHUNK]], inside, self._size)
                if len(block.members) <= CHUNK:
                    continue
                for seed in some[(at_least[some] >= NEVER) | (ball_costs[some] >= NEVER)].tolist():
                    near_one, ball = self._around(seed)
                    if len(near_one) >= self._size - 1:
                        at_least[seed] = self.costs[seed] + self.costs[near_one[: self._size - 1]].sum()
                    if len(ball) == self._size:
                        ball_costs[seed] = self.costs[ball].sum()
        return np.minimum(at_least, NEVER), ball_costs

    def _from(
        self, seeds: NDArray[np.int64], block: _Block, part: slice
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """[seeds, part of a block]: who comes after a seed and is near to it, and who is in the ball around it."""
        members, heights = block.members[part], block.heights[part]
        apart = np.zeros((len(seeds), len(members)))
        for axis, mine in zip(block.axes, self._positions[seeds].T, strict=True):
            away = axis[part] - mine[:, None]
            away *= away
            apart += away
        np.sqrt(apart, out=apart)
        apart += heights
        near = apart <= self._limit - self._heights[seeds][:, None]
        near &= members > seeds[:, None]
        return near, 2 * apart <= self._limit

    def _around(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The cheapest that come after a seed and are near to it, NEIGHBOURS and one more, and the cheapest gang in the
        ball around it."""
        block = self._blocks.around(seed)
        near, ball = [], []
        nears = balls = 0
        for begin in range(0, len(block.members), CHUNK):
            part = slice(begin, begin + CHUNK)
            is_near, inside = self._from(np.array([seed]), block, part)
            near.append(block.members[part][is_near[0]])
            ball.append(block.members[part][inside[0]])
            nears, balls = nears + len(near[-1]), balls + len(ball[-1])
            if nears > NEIGHBOURS and balls >= self._size:
                break
        return np.concatenate(near)[: NEIGHBOURS + 1], np.concatenate(ball)[: self._size]

    def _pairs(self, some: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[some, some]: whether they are near enough."""
        positions, heights = self._positions[some], self._heights[some]
        apart = positions[:, None, :] - positions[None, :, :]
        room = self._limit - heights[:, None] - heights[None, :]
        return np.asarray((room >= 0) & (np.einsum("ijk,ijk->ij", apart, apart) <= room * room))

    # --- a gang at once ----------------------------------------------------------------------------------------------

    def _improve(self, seed: int) -> None:
        """The gang around a member; its members are exchanged one by one as long as that makes it cheaper."""
        neighbours, ball = self._around(seed)
        some = np.union1d(ball, neighbours)
        near, costs = self._pairs(some), self.costs[some]
        inside = np.isin(some, ball)
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
        neighbours, _ = self._around(seed)
        own = int(self.costs[seed])
        if len(neighbours) > NEIGHBOURS:
            # What a gang costs with somebody who is not looked at.
            beyond = own + int(self.costs[neighbours[: self._size - 2]].sum()) + int(self.costs[neighbours[-1]])
            self.at_least = min(self.at_least, beyond)
            neighbours = neighbours[:NEIGHBOURS]
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
class _Block:
    """Candidates of a few cubes, in their order."""

    members: NDArray[np.int64]
    axes: tuple[NDArray[np.float64], ...]
    """Their positions, one axis after another."""
    heights: NDArray[np.float64]


class _Blocks:
    """Candidates by cubes whose sides are as long as two may be apart: who is near is in a cube or beside it."""

    def __init__(self, positions: NDArray[np.float64], heights: NDArray[np.float64], side: float) -> None:
        self._positions, self._heights = positions, heights
        self._cube = np.floor(positions / side).astype(np.int64)
        keys = self._keys(self._cube)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]] - 1))
        members = np.split(order, starts[1:])
        self._in = dict(zip(keys[order[starts]].tolist(), members, strict=True))
        self._steps = np.array(list(itertools.product((-1, 0, 1), repeat=positions.shape[1])))
        self._around: dict[bytes, _Block] = {}

    @staticmethod
    def _keys(cubes: NDArray[np.int64]) -> NDArray[np.int64]:
        """A number for each. Two cubes may have the same: who is there is then looked at in vain."""
        return np.asarray(cubes @ np.array(KEY_PRIMES[: cubes.shape[1]]))

    def groups(self, members: NDArray[np.int64]) -> Iterator[tuple[_Block, NDArray[np.int64]]]:
        """The members by cubes, each with what is around it."""
        by_cube: dict[bytes, list[int]] = {}
        for member in members.tolist():
            by_cube.setdefault(self._cube[member].tobytes(), []).append(member)
        for group in by_cube.values():
            yield self.around(group[0]), np.array(group)

    def around(self, member: int) -> _Block:
        """Of its cube and those beside it."""
        cube = self._cube[member]
        name = cube.tobytes()
        if name not in self._around:
            keys = dict.fromkeys(self._keys(cube + self._steps).tolist())
            members = np.sort(np.concatenate([self._in[key] for key in keys if key in self._in]))
            axes = tuple(np.ascontiguousarray(axis) for axis in self._positions[members].T)
            self._around[name] = _Block(members, axes, self._heights[members])
        return self._around[name]


def _first(costs: NDArray[np.int64], which: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """[rows]: what the first so many of each row of `which` [rows, costs] cost; NEVER where they are fewer."""
    places = np.cumsum(which, axis=1, dtype=np.int32)
    sums = np.where(which & (places <= count), costs, 0).sum(axis=1)
    return np.where(places[:, -1] >= count, sums, NEVER)


def _exchange(
    near: NDArray[np.bool_], costs: NDArray[np.int64], inside: NDArray[np.bool_], away: NDArray[np.int64]
) -> tuple[int, int] | None:
    """Who leaves and who comes, so that it becomes cheapest; none where nothing makes it cheaper."""
    members = np.flatnonzero(inside)
    best, saved = None, 0
    dearest = int(members[-1])
    for at in np.flatnonzero(~inside & (away <= 1) & (costs < costs[dearest])):
        leaves = dearest if away[at] == 0 else int(members[~near[at, members]][0])
        if costs[leaves] - costs[at] > saved:
            best, saved = (leaves, int(at)), int(costs[leaves] - costs[at])
    return best


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
