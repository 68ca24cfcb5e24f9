"""How much each accepted update counts, so that a minority cannot steer the mean.

**What is assumed.** Members that together hold less than a third of the weight, after capping, may send anything; they
may collude and know all other updates. The rest are honest: each update is a common signal plus noise of its own, the
noises roughly orthogonal (in high dimension they are, and on sparse updates with disjoint supports they are exactly),
and norms follow the work done. Nothing is assumed about coordinates: an update may touch any 1 % of them. So no
coordinate is trimmed, and distances between pairs, which are all alike here, decide nothing.

**What is done**, from the members' work and the Gram matrix of their updates alone:

1. Weight in proportion to work, at most `weight_cap` (what is above is spread over the others by water-filling). What
   the filter below takes goes to the others, within the cap too; what they have no room for is nobody's.
2. Norm relative to work. An update that is more than `norm_ratio_max` times the median (by weight) of
   norm / work ** 0.75 is shortened to it. Progress along a constant gradient grows with the work, a random walk with
   its root; sparse, sign-like updates with error feedback lie between. 0.75 is the middle: whichever is true, an
   honest member of a sixteenth of the others' work is misjudged by a factor of 2 at most, below the default 3.
3. Spectral filter (robust mean estimation by iterative filtering: Diakonikolas et al., "Being Robust (in High
   Dimensions) Can Be Practical", 2017; for gradients Shejwalkar and Houmansadr, "Manipulating the Byzantine", 2021;
   likeness betrays colluders: Fung et al., "The Limitations of Federated Learning in Sybil Settings", 2020). Let the
   variance of a direction be the weighted variance of the updates' projections on it. One honest member of weight w
   and noise s makes w s^2 in the direction of its noise, and honest members do not add up, being orthogonal. While
   some direction carries more than NOISE_FACTOR times the most that a single member may make, the members that stand
   out in it lose weight, until it does not.

**What follows.** If the members that are dishonest hold the part e of the final weights, and no direction carries more
than V, then the mean is off the honest members' weighted mean by at most sqrt(e / (1 - e) * V): along the line between
the two groups' means, D apart, the variance is at least e (1 - e) D^2, and the shift is e D. Identical updates of k
colluders end with the weight of one to a few members. Where the honest updates agree (little noise, early training), V
is SIGNAL_PART of the squared norm of the mean, so that likeness is no offence there: with e < 1/3 the shift is then
less than 36 % of the mean's own norm. Where members' work is unequal, V is larger, up to SIGNAL_PART_MAX of it, because
honest updates then differ along the common signal: the shift is then less than 71 %, and the mean still points down.

**Below the smallest safe membership.** A single member stays below a third only among at least 4 of equal weight, and
two colluders only among at least 7. With fewer, or when the cap cannot hold (n < 1 / weight_cap, where it is relaxed to
1 / n), what keeps a liar from steering is replay alone; the reason says so.

**Arithmetic.** IEEE double operations, square roots and exactly rounded sums (`math.fsum`) in a fixed order with fixed
iteration counts: the same bytes in, the same parts per million out, on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from shoal.protocol.training import PARTS_PER_MILLION

SAFE_MEMBERS = 4
"""Of equal weight: the fewest among which one dishonest member holds less than a third."""
NOISE_FACTOR = 1.5
"""A direction may carry this many times the variance of one member: honest noises are only roughly orthogonal."""
NORM_HEADROOM = 1.5
"""How far above the typical noise for its work a member's own may be to count in full as `one member`."""
SIGNAL_PART = 0.25
"""Variance below this part of the mean's squared norm is never filtered."""
SIGNAL_PART_MAX = 1.0
SPREAD_MARGIN = 1.5
"""Members of unequal work differ along the common signal without being dishonest: this many times the variance that
work alone explains is allowed beside SIGNAL_PART, up to SIGNAL_PART_MAX."""
STANDS_OUT = 2.0
"""Who has more than this many times the median squared projection on a direction stands out in it. The honest members'
is at most e^2, the colluders' at least (1 - e)^2 of the same: four times as much for e = 1/3."""
LEADERS = 0.4
"""Of those who stand out, only who has more than this part of the most is cut in a step: the others' turn comes, if it
does, when the leaders have been cut. This spares honest members whose noise happens to lean that way."""
FILTER_STEPS_MAX = 96
FILTER_RATE = 0.25
"""The member that stands out most loses this part of its weight in a step."""
TOUCHED = 0.999
GRAZED = 0.8
"""Members that keep this part of their weight or more lean towards a direction, but do not make it."""
REMOVED_MAX = 0.5
"""Filtering away a third of dishonest weight takes at most half as much honest weight along. When more than this would
go, the assumption does not hold, and nothing is filtered."""
FILTER_MEMBERS_MAX = 256
"""With more members only weights and norms are bounded; large gangs aggregate in parts."""
POWER_STEPS = 40


@dataclass(frozen=True, slots=True)
class Weight:
    """One member's weight in the mean, and how far its update is shortened first."""

    weight_ppm: int
    scale_ppm: int = PARTS_PER_MILLION
    reason: str = ""
    """Why it counts less than its work alone would; empty when it does not."""


@dataclass(frozen=True, slots=True)
class Weights:
    members: tuple[Weight, ...]
    """In the order asked. The weights add up to a million at most; what is missing is nobody's."""
    reason: str
    """About the round as a whole: whether the cap held, what the filter found. Empty when there is nothing to say."""


def weigh(work: Sequence[int], gram: Sequence[Sequence[float]], *, weight_cap: float, norm_ratio_max: float) -> Weights:
    """Weights of a round's updates.

    `work[i]`: member i's work (tokens). `gram[i][j]`: dot product of the decoded updates i and j, float64, shape
    (n, n); squared norms are on its diagonal. `weight_cap` and `norm_ratio_max` as in RoundSettings. An update counts
    nothing when its norm is not finite, when it is zero while others are not, or when there is no work behind it.
    """
    count = len(work)
    reasons = [""] * count
    norms = [_norm(gram[at][at]) for at in range(count)]
    usable = _usable(work, norms, reasons)
    if not usable:
        return Weights(tuple(Weight(0, reason=reason) for reason in reasons), "No update can be used.")

    weights, note = _capped([work[at] for at in usable], weight_cap)
    scales = [PARTS_PER_MILLION] * count
    expected = [_expected(work[at]) for at in usable]
    typical = _weighted_median([norms[at] / fair for at, fair in zip(usable, expected, strict=True)], weights)
    for at, fair in zip(usable, expected, strict=True):
        ratio = norms[at] / fair / typical if typical > 0 else 1.0
        if ratio > norm_ratio_max:
            scales[at] = int(PARTS_PER_MILLION * norm_ratio_max / ratio)
            reasons[at] = (
                f"Its update is {ratio:.3g} times as long as the median for its work; it was shortened to "
                f"{norm_ratio_max:.3g} times."
            )
    gone = [at for at in usable if scales[at] == 0]
    if gone:  # too long to be expressed when shortened
        keep = [at for at in usable if scales[at]]
        rest = weigh(
            [work[at] for at in keep], [[gram[at][other] for other in keep] for at in keep],
            weight_cap=weight_cap, norm_ratio_max=norm_ratio_max,
        )  # fmt: skip
        members = dict(zip(keep, rest.members, strict=True))
        return Weights(tuple(members.get(at, Weight(0, reason=reasons[at])) for at in range(count)), rest.reason)

    if typical > 0 and 2 < len(usable) <= FILTER_MEMBERS_MAX:
        parts = [scales[at] / PARTS_PER_MILLION for at in usable]
        cosines = [[_bounded(gram[at][other], norms[at], norms[other]) for other in usable] for at in usable]
        lengths = [norms[at] / typical * part for at, part in zip(usable, parts, strict=True)]
        filtered, why, result = _filtered(weights, cosines, lengths, expected, [work[at] for at in usable])
        note = f"{note} {result}".strip()
        untouched = [not reason for reason in why]
        for at, reason in zip(usable, why, strict=True):
            reasons[at] = f"{reasons[at]} {reason}".strip()
        weights = _redistributed(filtered, untouched, weight_cap)
        nobodys = 1 - math.fsum(weights)
        if nobodys > 1 / PARTS_PER_MILLION:
            note = (
                f"{note} The weight cap of {weight_cap:.3g} leaves no room for {nobodys:.1%} of the weight, which the "
                "filter took: it is nobody's, and the step is the shorter."
            ).strip()

    whole = _parts_per_million(weights)
    ppm = dict(zip(usable, whole, strict=True))
    return Weights(
        tuple(Weight(ppm.get(at, 0), scales[at], reasons[at]) for at in range(count)),
        note,
    )


def _norm(square: float) -> float:
    return math.sqrt(square) if square >= 0 and math.isfinite(square) else math.nan


def _usable(work: Sequence[int], norms: Sequence[float], reasons: list[str]) -> list[int]:
    all_zero = all(norm == 0 for norm in norms if not math.isnan(norm))
    usable = []
    for at, norm in enumerate(norms):
        if math.isnan(norm):
            reasons[at] = "Its update's norm is not a finite number; it does not count."
        elif work[at] <= 0:
            reasons[at] = "There is no work behind its update; it does not count."
        elif norm == 0 and not all_zero:
            reasons[at] = "Its update is zero; it does not count."
        else:
            usable.append(at)
    return usable


def _expected(work: int) -> float:
    """work ** 0.75, by square roots, which are the same everywhere."""
    root = math.sqrt(float(work))
    return root * math.sqrt(root)


def _capped(work: Sequence[float], cap: float) -> tuple[list[float], str]:
    """Weights in proportion to work and at most `cap`; what is above goes to the others in proportion to theirs."""
    count = len(work)
    note = ""
    if count < SAFE_MEMBERS:
        note = (
            f"{count} member{'s' if count > 1 else ''}, fewer than {SAFE_MEMBERS}: a single one holds a third of the "
            f"weight or more, and robustness rests on replay alone."
        )
    if cap * count < 1:
        note += f" The weight cap of {cap:.3g} cannot hold among {count}; it was relaxed to {1 / count:.3g}."
        cap = 1 / count
    total = math.fsum(work)
    weights = [part / total for part in work]
    full: set[int] = set()
    for _ in range(count):
        above = [at for at, weight in enumerate(weights) if at not in full and weight > cap]
        if not above:
            break
        full.update(above)
        free = math.fsum(work[at] for at in range(count) if at not in full)
        left = 1 - cap * len(full)
        weights = [cap if at in full else left * work[at] / free for at in range(count)]
    if len(full) == count:
        weights = [1 / count] * count
    return weights, note.strip()


def _weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The lower weighted median."""
    half = math.fsum(weights) / 2
    below: list[float] = []
    order = sorted(range(len(values)), key=lambda at: (values[at], at))
    for at in order:
        below.append(weights[at])
        if math.fsum(below) >= half:
            return values[at]
    return values[order[-1]]


def _bounded(dot: float, left: float, right: float) -> float:
    """The cosine, kept within what is possible."""
    most = left * right
    if most == 0 or not math.isfinite(dot):
        return 0.0
    return max(-1.0, min(1.0, dot / left / right))


def _filtered(
    weights: list[float],
    cosines: list[list[float]],
    lengths: list[float],
    expected: list[float],
    work: list[int],
) -> tuple[list[float], list[str], str]:
    """Down-weight who makes a direction that one member's own noise could not. `lengths` are norms over the typical
    norm per expected; returns weights (adding up to 1), a reason per member, and a remark."""
    count = len(weights)
    dots = [[cosines[i][j] * lengths[i] * lengths[j] for j in range(count)] for i in range(count)]
    start = list(weights)
    centred, mean_square = _centred(dots, weights)
    # Among orthogonal noises s, the squared distance to the common mean is (1 - w) s^2.
    noises = [max(0.0, centred[at][at]) / (1 - weights[at]) for at in range(count)]
    typical = _weighted_median([noise / fair**2 for noise, fair in zip(noises, expected, strict=True)], weights)
    fair_noises = [typical * (NORM_HEADROOM * fair) ** 2 for fair in expected]
    singles = [min(noise, fair) for noise, fair in zip(noises, fair_noises, strict=True)]
    signal_part = _signal_part(work, weights)

    kept = list(weights)
    ratio = variance = allowed = 0.0
    for number in range(FILTER_STEPS_MAX):
        variance, direction = _top(centred, weights)
        one = max(map(mul, weights, singles))
        allowed = max(NOISE_FACTOR * one, signal_part * mean_square)
        if number == 0:
            ratio = variance / one if one > 0 else math.inf
        if variance <= allowed:
            break
        squares = [
            variance * part * part / weight if weight > 0 else 0.0
            for part, weight in zip(direction, weights, strict=True)
        ]
        most = max(squares)
        line = max(STANDS_OUT * _weighted_median(squares, weights), LEADERS * most)
        if most <= line:
            break
        kept = [
            old * (1 - FILTER_RATE * max(0.0, square - line) / (most - line))
            for old, square in zip(kept, squares, strict=True)
        ]
        total = math.fsum(kept)
        weights = [weight / total for weight in kept]
        if total < 1 - REMOVED_MAX:
            break
        centred, mean_square = _centred(dots, weights)
    touched = [new < TOUCHED * old for new, old in zip(kept, start, strict=True)]
    if variance > allowed and (not any(touched) or math.fsum(kept) < 1 - REMOVED_MAX):
        weights, touched = start, [False] * count
    remark = ""
    if variance > allowed:
        remark = (
            f"One direction carries {ratio:.2g} times the variance of one member's own noise, and filtering left "
            f"{variance / allowed:.2g} times what is allowed: dishonest members may hold a third of the weight or "
            f"more, and robustness rests on replay."
        )
    leading = sum(new < GRAZED * old for new, old in zip(kept, start, strict=True))
    reasons = [
        _cut_reason(new / old, leading, ratio) if hit else ""
        for hit, old, new in zip(touched, start, kept, strict=True)
    ]
    return weights, reasons, remark


def _cut_reason(kept: float, leading: int, ratio: float) -> str:
    cut = f"its weight was cut to {kept:.1%} of what its work gives."
    variance = f"{ratio:.2g} times the variance of one member's own noise ({NOISE_FACTOR:.2g} allowed)"
    if kept >= GRAZED:
        return f"It leans towards a direction that {leading} others pushed with {variance}; {cut}"
    if leading == 1:
        return f"It alone stands out in a direction with {variance}; {cut}"
    return f"It and {leading - 1} others pushed one direction with {variance}; {cut}"


def _signal_part(work: Sequence[int], weights: Sequence[float]) -> float:
    """How much variance, in parts of the mean's squared norm, honest members make along a common signal:
    SIGNAL_PART, and what unequal work alone makes (updates in proportion to work, the widest case)."""
    mean = math.fsum(map(mul, work, weights))
    spread = math.fsum(weight * (part - mean) ** 2 for part, weight in zip(work, weights, strict=True)) / mean**2
    return min(SIGNAL_PART_MAX, SIGNAL_PART + SPREAD_MARGIN * spread)


def _centred(dots: list[list[float]], weights: list[float]) -> tuple[list[list[float]], float]:
    """Dot products of the differences to the weighted mean, and the mean's squared norm."""
    with_mean = [math.fsum(map(mul, row, weights)) for row in dots]
    square = max(0.0, math.fsum(map(mul, with_mean, weights)))
    centred = [
        [dot - left - right + square for dot, right in zip(row, with_mean, strict=True)]
        for row, left in zip(dots, with_mean, strict=True)
    ]
    return centred, square


def _top(centred: list[list[float]], weights: list[float]) -> tuple[float, list[float]]:
    """The largest eigenvalue of sqrt(w_i) C_ij sqrt(w_j), and a unit eigenvector, by power iteration."""
    roots = [math.sqrt(weight) for weight in weights]
    matrix = [[left * dot * right for dot, right in zip(row, roots, strict=True)]
              for row, left in zip(centred, roots, strict=True)]  # fmt: skip
    # A fixed start without pattern: fractional parts of multiples of the golden ratio.
    vector = [((at + 1) * 0.6180339887498949) % 1.0 - 0.5 for at in range(len(weights))]
    value = 0.0
    for _ in range(POWER_STEPS):
        image = [math.fsum(map(mul, row, vector)) for row in matrix]
        value = math.sqrt(math.fsum(map(mul, image, image)))
        if value == 0:
            return 0.0, vector
        vector = [part / value for part in image]
    return value, vector


def _redistributed(weights: list[float], untouched: list[bool], cap: float) -> list[float]:
    """What the filter took goes to those it left alone, up to the cap. What is still left then is nobody's: the weights
    add up to less than 1, and the step is the shorter."""
    if all(untouched):
        return weights
    cap = max(cap, 1 / len(weights))
    result = [min(cap, weight) for weight in weights]
    free = [at for at, alone in enumerate(untouched) if alone]
    rest = 1 - math.fsum(result[at] for at in range(len(weights)) if not untouched[at])
    if free:
        shared, _ = _capped([weights[at] for at in free], cap / rest)
        for at, weight in zip(free, shared, strict=True):
            result[at] = min(cap, weight * rest)
    return result


def _parts_per_million(weights: Sequence[float]) -> list[int]:
    """Round to parts per million, by largest remainder, so that all of a million are given where the weights add up
    to 1."""
    total = math.fsum(weights)
    whole_sum = round(min(1.0, total) * PARTS_PER_MILLION)
    exact = [weight / total * whole_sum for weight in weights]
    whole = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda at: (whole[at] - exact[at], at))
    for at in order[: whole_sum - sum(whole)]:
        whole[at] += 1
    return whole
