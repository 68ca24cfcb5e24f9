"""Training over a slow link, measured: speed, bytes and loss of several peers, side by side in one run.

    sudo .venv/bin/python benchmarks/training.py            everything; the plan with its minutes is printed first
    sudo .venv/bin/python benchmarks/training.py --quick    a few minutes; shows that it works, proves little

Two workers, each held to 0.8 of a core in a network namespace of its own, train the same model on the same data over a
shaped link. Three parts: `speed` (tokens per second as a share of lone workers, bytes per token at the interface),
`loss` (held-out loss after a million tokens, each peer at its best learning rate) and `mixed` (four workers of unequal
speed). What is measured how, and why: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import corpus as corpora
import limits
import links
from corpus import Corpus
from ground import Ground, orderly_end
from links import LINKS, CannotMeasure, Link
from peers import DDP, DILOCO, Alone, Job, Peer, Run, held_out_loss, make_start, stopwatch
from results_form import figure, keep, report
from shoal_peer import Shoal

CORES = 0.8
"""Share of a core every worker is held to."""
MIXED = tuple(round(1.6 * ratio / 2.75, 3) for ratio in (1.0, 1.0, 0.5, 0.25))
"""Shares of a core of the mixed workers: 1 : 1 : 0.5 : 0.25, together 1.6."""
GRID = (5e-4, 1e-3, 2e-3, 3e-3, 4e-3)
GRID_SEED = 1000
MIXED_BYTE_BUDGET = "40 kB/s"
"""What a mixed worker may send: each receives the updates of three others, and the smallest has a seventh of a core."""
SPEED_GOAL, BYTES_GOAL, MIXED_GOAL = 0.95, 1000.0, 0.93
STARTING_ESTIMATE_S = 12.0
RATE_ESTIMATE = 15_000.0
"""Tokens per second of two workers, only for telling how long a run will take."""
CORES_TOLERANCE = 0.02
"""A worker may exceed its share by so much before the run is refused: its limit did not hold."""


@dataclass(frozen=True)
class Extent:
    """How long one repetition of a peer goes on over a link."""

    rounds: int | None = None
    seconds: float | None = None
    warmup: int = 1
    estimate_s: float = 0.0


def extent(peer: str, link: str, quick: bool) -> Extent:
    """Slow peers are measured over few rounds: each round is the same, and bytes a round hardly vary."""
    if peer == "ddp":
        rounds, each = {"home": (6 if quick else 16, 1.6), "poor": (2 if quick else 3, 22.0)}[link]
        return Extent(rounds=rounds + 2, warmup=2, estimate_s=(rounds + 2) * each)
    if peer == "diloco":
        rounds, each = {"home": (2 if quick else 4, 8.0), "poor": (1 if quick else 2, 28.0)}[link]
        return Extent(rounds=rounds + 1, warmup=1, estimate_s=(rounds + 1) * each)
    if peer == "shoal":
        seconds = 12.0 if quick else {"home": 40.0, "poor": 60.0}[link]
        return Extent(seconds=seconds, warmup=3, estimate_s=seconds + {"home": 25.0, "poor": 80.0}[link])
    seconds = 8.0 if quick else 20.0
    return Extent(seconds=seconds, warmup=10, estimate_s=seconds + 2)


@dataclass
class Bench:
    """One run of this script."""

    folder: Path
    corpus: Corpus
    alone: Alone
    peers: Sequence[Peer]
    """Without the lone workers; those whose goals are judged are called `shoal`."""
    quick: bool
    repetitions: int
    seeds: int
    tokens: int
    grid: tuple[float, ...]
    say: Callable[[str], None]
    hub_beside_worker: bool = False

    def __post_init__(self) -> None:
        self._begun = 0
        self._starts: dict[int, Path] = {}
        self.parameters = 0

    def start(self, seed: int) -> Path:
        if seed not in self._starts:
            path = self.folder / f"start-{seed}"
            with Ground(None, [], self.folder / "logs") as ground:
                self.parameters = make_start(ground, path, seed)
            self._starts[seed] = path
        return self._starts[seed]

    @contextlib.contextmanager
    def ground(self, peer: Peer, link: Link | None, cores: Sequence[float | None]) -> Iterator[tuple[Ground, Path]]:
        """A fresh ground for one run of one peer, and a folder for what it writes."""
        self._begun += 1
        folder = self.folder / f"{self._begun:03d}-{peer.name}"
        folder.mkdir()
        beside = self.hub_beside_worker
        with Ground(link, cores, folder / "logs", seed=self._begun, hub_beside_worker=beside) as ground:
            yield ground, folder

    def job(self, folder: Path, seed: int, learning_rate: float, how: Extent) -> Job:
        return Job(
            corpus=self.corpus, start=self.start(seed), folder=folder, seed=seed, learning_rate=learning_rate,
            budget_tokens=self.tokens, rounds=how.rounds, seconds=how.seconds, warmup_rounds=how.warmup,
        )  # fmt: skip

    def run(self, peer: Peer, link: Link, cores: Sequence[float], how: Extent, seed: int) -> Run:
        self.start(seed)
        with self.ground(peer, link, cores) as (ground, folder):
            run = peer.run(ground, self.job(folder, seed, 2e-3, how))
        shutil.rmtree(folder)
        for asked, used in zip(cores, run.cores, strict=True):
            if used > asked + CORES_TOLERANCE:
                raise CannotMeasure(f"A worker of {peer.name} used {used:.3f} of a core where {asked:g} was its limit.")
        if run.congestion_controls - {links.CONGESTION_CONTROL}:
            raise CannotMeasure(
                f"{peer.name} used {', '.join(sorted(run.congestion_controls))} congestion control; this comparison is "
                f"made with {links.CONGESTION_CONTROL} for all."
            )
        return run


# --- speed and bytes -------------------------------------------------------------------------------------------------


def speed(bench: Bench, link: Link) -> list[dict[str, object]]:
    given = links.measure(link, seconds=4 if bench.quick else 12)
    bench.say(f"{given}")
    runs: dict[str, list[Run]] = {peer.name: [] for peer in (bench.alone, *bench.peers)}
    # Machines in the cloud are faster in one minute than in the next: the reference is measured before and after the
    # peer that is judged by it.
    order = [*bench.peers[:-1], bench.alone, bench.peers[-1], bench.alone]
    for repetition in range(bench.repetitions):
        for peer in order:
            run = bench.run(peer, link, [CORES, CORES], extent(peer.name, link.name, bench.quick), repetition)
            runs[peer.name].append(run)
            bench.say(
                f"{link.name} {repetition + 1}/{bench.repetitions} {peer.name:8} {run.tokens_per_s:9.1f} tokens/s "
                f"{run.bytes_per_token:10.3f} bytes/token, {run.tokens} tokens in {run.seconds:.1f} s, cores "
                + " ".join(f"{share:.3f}" for share in run.cores)
                + f" + hub {run.hub_cores:.3f}; kB sent by host "
                + " ".join(f"{sent / 1000:.0f}" for sent in run.sent_by_host)
                + run.noted
            )
    rates_alone = [run.tokens_per_s for run in runs["alone"]]
    lone = [statistics.fmean(pair) for pair in zip(rates_alone[::2], rates_alone[1::2], strict=True)]
    figures = [
        figure(f"{link.name}/link/round_trip", round(given.round_trip_ms, 2), "ms",
               compared_with=f"{link.round_trip_ms:g} asked"),
        figure(f"{link.name}/link/tcp_rate", round(min(given.tcp_mbps), 3), "Mbit/s",
               compared_with=f"{link.mbps:g} asked; one {given.congestion_control} connection, the slower direction"),
        figure(f"{link.name}/link/loss", round(given.loss * 100, 3), "%", compared_with=f"{link.loss:.2%} asked"),
        figure(f"{link.name}/alone/tokens_per_s", round(statistics.median(lone), 1), "tokens/s",
               compared_with=_range(rates_alone, 1)),
    ]  # fmt: skip
    goals = link.name == "home"
    for peer in bench.peers:
        rates = [run.tokens_per_s for run in runs[peer.name]]
        shares = [rate / reference for rate, reference in zip(rates, lone, strict=True)]
        share = statistics.median(shares)
        judged = goals and peer.name == "shoal"
        figures.append(figure(f"{link.name}/{peer.name}/tokens_per_s", round(statistics.median(rates), 1), "tokens/s",
                              compared_with=_range(rates, 1)))  # fmt: skip
        figures.append(figure(
            f"{link.name}/{peer.name}/share_of_alone", round(share * 100, 2), "%",
            goal=f"at least {SPEED_GOAL:.0%}" if judged else None, holds=share >= SPEED_GOAL if judged else None,
            compared_with="two lone workers in the same repetition, mean of two runs; "
            + _range([s * 100 for s in shares], 1),
        ))  # fmt: skip
        cost = [run.bytes_per_token for run in runs[peer.name]]
        figures.append(figure(f"{link.name}/{peer.name}/bytes_per_token", round(statistics.median(cost), 4), "B/token",
                              compared_with=_range(cost, 4)))  # fmt: skip
        figures.append(figure(
            f"{link.name}/{peer.name}/startup_bytes",
            int(statistics.median(run.startup_bytes for run in runs[peer.name])), "B",
        ))  # fmt: skip
        if peer.name != "ddp" and "ddp" in runs:
            fewer = statistics.median(run.bytes_per_token for run in runs["ddp"]) / statistics.median(cost)
            figures.append(figure(
                f"{link.name}/{peer.name}/times_fewer_bytes", round(fewer, 1), "x",
                goal=f"at least {BYTES_GOAL:g}" if judged else None, holds=fewer >= BYTES_GOAL if judged else None,
                compared_with="bytes per token of ddp",
            ))  # fmt: skip
    return figures


def _range(values: Sequence[float], digits: int) -> str:
    return f"median of {len(values)}, range {min(values):.{digits}f} to {max(values):.{digits}f}"


# --- loss ------------------------------------------------------------------------------------------------------------


def loss(bench: Bench) -> list[dict[str, object]]:
    def train(peer: Peer, seed: int, learning_rate: float) -> float:
        link = LINKS["home"] if peer.needs_link else None
        cores = [CORES, CORES] if peer.needs_link else [None, None]
        bench.start(seed)
        taken = stopwatch()
        with bench.ground(peer, link, cores) as (ground, folder):
            run = peer.run(ground, bench.job(folder, seed, learning_rate, Extent(warmup=0)))
            if run.model is None:
                raise CannotMeasure(f"{peer.name} left no model to evaluate.")
            found = held_out_loss(ground, bench.corpus, 128, [run.model])[0]
        shutil.rmtree(folder)
        bench.say(
            f"loss {peer.name:8} seed {seed}, learning rate {learning_rate:g}: {found:.4f}  "
            f"({taken():.0f} s{run.noted})"
        )
        return found

    begin = bench.start(0)
    with Ground(None, [], bench.folder / "logs") as ground:
        untrained = held_out_loss(ground, bench.corpus, 128, [begin])[0]
    figures = [
        figure("loss/untrained", round(untrained, 4), "nats/byte"),
        figure("loss/unigram", round(bench.corpus.unigram_loss, 4), "nats/byte"),
    ]
    bar: float | None = None
    full = bench.tokens >= 1_000_000 and bench.seeds >= 3
    for peer in bench.peers:
        tried = {rate: train(peer, GRID_SEED, rate) for rate in bench.grid}
        best = min(tried, key=lambda rate: (tried[rate] if math.isfinite(tried[rate]) else math.inf, rate))
        found = [train(peer, seed, best) for seed in range(bench.seeds)]
        mean = statistics.fmean(found)
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        grid = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in tried.items())
        judged = peer.name == "shoal" and bar is not None and full
        figures.append(figure(
            f"loss/{peer.name}", round(mean, 4), "nats/byte",
            goal=f"at most {bar:.4f}, the mean of ddp plus one standard error" if judged else None,
            holds=mean <= bar if judged and bar is not None else None,
            compared_with=f"{bench.tokens} tokens, mean of {len(found)} seeds ({', '.join(f'{v:.4f}' for v in found)}; "
            f"standard error {error:.4f}), learning rate {best:g} from seed {GRID_SEED} ({grid})",
        ))  # fmt: skip
        if peer.name == "ddp":
            bar = mean + error
    return figures


# --- mixed speeds ----------------------------------------------------------------------------------------------------


def mixed(bench: Bench) -> list[dict[str, object]]:
    """Four workers of unequal speed, over the home link: accepted tokens against what each does alone."""
    link, shoal = LINKS["home"], Shoal({"byte_budget": MIXED_BYTE_BUDGET})
    how = Extent(seconds=10.0 if bench.quick else 15.0, warmup=4)
    together, apart, got = [], [], []
    for repetition in range(bench.repetitions):
        at_once = bench.run(bench.alone, link, MIXED, how, repetition).tokens_per_s
        before = sum(bench.run(bench.alone, link, [cores], how, repetition).tokens_per_s for cores in MIXED[::2])
        run = bench.run(shoal, link, MIXED, extent(shoal.name, link.name, bench.quick), repetition)
        after = sum(bench.run(bench.alone, link, [cores], how, repetition).tokens_per_s for cores in MIXED[1::2])
        one_by_one = before + after  # half of them before and half after, as the machine's speed drifts
        together.append(run.tokens_per_s / at_once)
        apart.append(run.tokens_per_s / one_by_one)
        got.append(run.tokens_per_s)
        bench.say(
            f"mixed {repetition + 1}/{bench.repetitions}: {run.tokens_per_s:.1f} tokens/s, lone workers one by one "
            f"{one_by_one:.1f}, all at once {at_once:.1f}; cores " + " ".join(f"{share:.3f}" for share in run.cores)
        )
    share = statistics.median(apart)
    return [
        figure("mixed/shoal/tokens_per_s", round(statistics.median(got), 1), "tokens/s", compared_with=_range(got, 1)),
        figure("mixed/shoal/share_of_alone", round(share * 100, 2), "%", goal=f"at least {MIXED_GOAL:.0%}",
               holds=share >= MIXED_GOAL, compared_with="sum of each worker's rate alone at the same limit; "
               + _range([s * 100 for s in apart], 1)),
        figure("mixed/shoal/share_of_alone_at_once", round(statistics.median(together) * 100, 2), "%",
               compared_with="lone workers, all four at once; " + _range([s * 100 for s in together], 1)),
    ]  # fmt: skip


# --- the run ---------------------------------------------------------------------------------------------------------


def plan(bench: Bench, parts: Sequence[str], chosen: Sequence[Link]) -> float:
    """Print what will be done; gives minutes."""
    total = 0.0
    corpus = bench.corpus
    print(f"corpus {corpus.hash}: {corpus.train_tokens} train tokens, {corpus.held_out_tokens} held out")
    if "speed" in parts:
        for link in chosen:
            each = {p.name: extent(p.name, link.name, bench.quick).estimate_s + STARTING_ESTIMATE_S
                    for p in (bench.alone, *bench.peers)}  # fmt: skip
            minutes = (60 + bench.repetitions * (sum(each.values()) + each["alone"])) / 60
            shown = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in each.items())
            print(f"speed over the {link}: {bench.repetitions} repetitions of {shown}: about {minutes:.0f} minutes")
            total += minutes
    if "loss" in parts:
        runs = len(bench.grid) + bench.seeds
        minutes = len(bench.peers) * runs * (bench.tokens / RATE_ESTIMATE + 2 * STARTING_ESTIMATE_S) / 60
        print(
            f"loss of {', '.join(p.name for p in bench.peers)} after {bench.tokens} tokens: {runs} runs each (learning "
            f"rates {', '.join(f'{rate:g}' for rate in bench.grid)} on one seed, then {bench.seeds} seeds): about "
            f"{minutes:.0f} minutes"
        )
        total += minutes
    if "mixed" in parts:
        minutes = bench.repetitions * (5 * (15 + STARTING_ESTIMATE_S) + 40 + 110) / 60
        print(f"mixed speeds {' : '.join(f'{c:g}' for c in MIXED)} of a core: about {minutes:.0f} minutes")
        total += minutes
    print(f"in all about {total:.0f} minutes", flush=True)
    return total


def table(figures: Sequence[dict[str, object]]) -> None:
    print()
    width = max(len(str(entry["name"])) for entry in figures)
    for entry in figures:
        verdict = {True: "holds", False: "DOES NOT HOLD", None: ""}[entry["holds"]]  # type: ignore[index]
        goal = f"  goal {entry['goal']}: {verdict}" if entry["goal"] else ""
        against = f"  ({entry['compared_with']})" if entry["compared_with"] else ""
        print(f"{entry['name']!s:{width}}  {entry['value']!s:>12} {entry['unit']}{goal}{against}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shoal = Shoal()
    known: dict[str, Peer] = {peer.name: peer for peer in (DDP, DILOCO, shoal)}
    parser.add_argument("--quick", action="store_true", help="short form of everything, a few minutes")
    parser.add_argument("--only", default="speed,loss,mixed", help="parts, separated by commas (%(default)s)")
    parser.add_argument("--links", default=None, help="links, separated by commas (home,poor; --quick: home)")
    parser.add_argument("--peers", default=",".join(known), help="peers beside the lone workers (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=None, help="interleaved repetitions (5; --quick: 1)")
    parser.add_argument("--tokens", type=int, default=None, help="tokens of a loss run (1048576; --quick: 204800)")
    shown = ",".join(f"{rate:g}" for rate in GRID)
    parser.add_argument("--grid", default=None, help=f"learning rates tried for a loss ({shown}; --quick: 2e-3)")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of a loss (3; --quick: 1)")
    parser.add_argument(
        "--driver",
        choices=("apart", "worker"),
        default="worker",
        help="hub and driver on the first worker's host, as when one of two drives, or on a host of their own "
        "(%(default)s)",
    )
    parser.add_argument(
        "--rounds",
        default='{"bytes_per_token": 3.3}',
        help="fields of shoal's rounds section, as JSON (%(default)s)",
    )
    parser.add_argument("--save", action="store_true", help="keep each part in benchmarks/results/training-PART.json")
    parser.add_argument("--keep", type=Path, default=None, help="work in this folder and leave it")
    given = parser.parse_args()
    parts, quick = given.only.split(","), given.quick
    grid = tuple(float(rate) for rate in given.grid.split(",")) if given.grid else GRID[2:3] if quick else GRID
    names = (given.links or ("home" if quick else "home,poor")).split(",")
    for what, wanted, there in (
        ("part", parts, ("speed", "loss", "mixed")), ("link", names, LINKS), ("peer", given.peers.split(","), known)
    ):  # fmt: skip
        for name in wanted:
            if name not in there:
                sys.exit(f"There is no {what} called {name!r}; there are {', '.join(there)}.")
    folder = given.keep or Path(tempfile.mkdtemp(prefix="shoal-benchmark-"))
    since = stopwatch()

    def say(line: str) -> None:
        print(f"[{since() / 60:6.1f} min] {line}", flush=True)

    try:
        with orderly_end():
            links.require_root()
            limits.sweep()
            chosen = [known[name] for name in given.peers.split(",")]
            shoal.rounds.update(json.loads(given.rounds))
            bench = Bench(
                folder=folder,
                corpus=corpora.build(folder / "corpus"),
                alone=Alone(beside=shoal.beside if shoal in chosen else None),
                peers=chosen,
                quick=quick,
                repetitions=given.repetitions or (1 if quick else 5),
                seeds=given.seeds or (1 if quick else 3),
                tokens=given.tokens or (204_800 if quick else 1_048_576),
                grid=grid,
                say=say,
                hub_beside_worker=given.driver == "worker",
            )
            if shoal not in chosen and "mixed" in parts:
                parts.remove("mixed")
                say("mixed speeds are left out: they need the peer shoal")
            plan(bench, parts, [LINKS[name] for name in names])
            held = limits.measure(CORES, seconds=2 if quick else 4)
            say(f"two busy groups held to {CORES:g} of a core each used " + " and ".join(f"{s:.3f}" for s in held))
            if min(held) < CORES - CORES_TOLERANCE:
                say("something else is using this machine: these figures show that it works, and no more")
            asked = f"{CORES:g} asked; two busy groups at once, the other got {min(held):.4f}"
            figures = [figure("limit/cores", round(max(held), 4), "cores", compared_with=asked)]

            def done(part: str, found: list[dict[str, object]]) -> None:
                figures.extend(found)
                if given.save:  # at once: a later part may fail
                    keep([figures[0], *found], f"training-{part}")

            for name in names if "speed" in parts else []:
                done(name, speed(bench, LINKS[name]))
            if "mixed" in parts:
                done("mixed", mixed(bench))
            if "loss" in parts:
                done("loss", loss(bench))
            figures.append(figure("parameters", bench.parameters, "parameters"))
    except CannotMeasure as error:
        sys.exit(f"{error}\n(what was written so far is in {folder})")
    except KeyboardInterrupt:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
        sys.exit("stopped; every process and namespace is gone")
    if given.keep is None:
        shutil.rmtree(folder)
    table(figures)
    report(figures)


if __name__ == "__main__":
    main()
