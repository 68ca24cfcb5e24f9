"""A job as it might have gone, told in signed records and lines: five unequal nodes, of which one is killed at 40 % of
the time, one joins halfway, and one lies until a replay finds it out."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from shoal.driver.folder import RunFolder
from shoal.driver.lines import AuditLine, AuditVerdict, Evaluation, Event, EventKind, Lane, LaneSegment, RoundMetrics
from shoal.driver.report import AuditCount, Completion, Figures, Goal, NodeFigures, NodeStatus, ReplayCost, RoundChoice
from shoal.identity import Envelope, KeyPair, blake3_hash
from shoal.protocol.blobs import BlobRef
from shoal.protocol.messages import sign
from shoal.protocol.training import (
    Accepted,
    Assignment,
    Commit,
    Contribution,
    DataRef,
    Engine,
    Excluded,
    Grant,
    Member,
    MemberNode,
    ModelRef,
    NodeWork,
    OptimizerSettings,
    ReplaySettings,
    RoundSettings,
    SampleRange,
    Share,
    Term,
    TrainJob,
)

SEQUENCE_TOKENS = 128
ROUND_S = 1.8


def blob(name: str) -> BlobRef:
    return BlobRef(blake3_hash(name.encode()), 40_000)


@dataclass
class Story:
    """Records in order, lines in order, and the driver's last figures."""

    rounds: int = 120
    names: tuple[str, ...] = ("anchovy", "bream", "cod", "dab", "eel")
    speeds: tuple[float, ...] = (1.0, 1.0, 0.5, 0.25, 0.5)
    killed: int | None = 1
    late: int | None = 4
    liar: int | None = 2
    found_share: float = 0.62
    """When the replay finds the lie, as a share of the rounds."""
    seed: int = 1
    keys: list[KeyPair] = field(default_factory=list)
    records: list[tuple[Envelope, bool]] = field(default_factory=list)
    """Each with whether it is appended durably."""
    lines: list[object] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    """What the story itself says that each node's accepted work was, by node id."""
    excluded: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.owner, self.heir = (KeyPair.from_seed(bytes([number]) * 32) for number in (200, 201))
        self.keys = [KeyPair.from_seed(bytes([place + 1]) * 32) for place in range(len(self.names))]
        job = TrainJob(
            name="quickstart",
            created_ms=1_790_000_000_000,
            seed=self.seed,
            model=ModelRef(start=blob("start"), parameters=860_000),
            data=DataRef(samples=1_000_000, sequence_tokens=SEQUENCE_TOKENS, vocabulary=257),
            token_budget=5_400_000,
            batch_samples=16,
            optimizer=OptimizerSettings(),
            rounds=RoundSettings(),
            replay=ReplaySettings(),
        )
        self.job = sign(self.owner, job)
        self._tell()

    def put(self, key: KeyPair, record: object, durable: bool = False) -> bytes:
        envelope = sign(key, record)  # type: ignore[arg-type]
        self.records.append((envelope, durable))
        return envelope.record_id

    def event(
        self, time_s: float, kind: EventKind, place: int | None, sentence: str, number: int | None = None
    ) -> None:
        node = "" if place is None else self.keys[place].node_id.hex()
        self.lines.append(Event(time_s=time_s, kind=kind, node=node, sentence=sentence, round=number))

    def lane(self, place: int, state: Lane, start: float, stop: float) -> None:
        self.lines.append(LaneSegment(node=self.keys[place].node_id.hex(), state=state, start_s=start, stop_s=stop))

    def join(self, place: int) -> bytes:
        key = self.keys[place]
        member = Member(
            job=self.job.record_id,
            nodes=(MemberNode(key.node_id, "whole", 1_000_000),),
            session=bytes([place]) * 16,
            name=self.names[place],
        )
        return self.put(key, member)

    def _tell(self) -> None:
        job_id = self.job.record_id
        drivers = (self.owner.node_id, self.heir.node_id)
        grant = self.put(self.owner, Grant(job=job_id, drivers=drivers, not_after_ms=1_800_000_000_000))
        self.put(self.owner, Term(job=job_id, number=1, grant=grant, head=job_id, head_round=-1))
        members = {place: self.join(place) for place in range(len(self.names)) if place != self.late}
        now, total, previous = 6.0, 0, job_id
        death = round(self.rounds * 0.4)
        joining = self.rounds // 2
        found = round(self.rounds * self.found_share)
        gone: set[int] = set()
        for place in members:
            self.lane(place, Lane.SYNCING, 0.0, now)
            self.event(
                now, EventKind.JOINED, place, f"{self.names[place]} joined at {self.speeds[place]:g} of full speed."
            )
        self.lines.append(Evaluation(round=-1, time_s=0.0, tokens_total=0, loss=5.581))
        for number in range(self.rounds):
            if number == joining and self.late is not None:
                members[self.late] = self.join(self.late)
                self.lane(self.late, Lane.SYNCING, now - 4.5, now)
                self.event(now, EventKind.JOINED, self.late, f"{self.names[self.late]} joined at round {number}.")
            present = [place for place in members if place not in gone]
            shares = {place: max(1, round(160 * self.speeds[place])) for place in present}
            start = 0
            ranges = {}
            for place, samples in shares.items():
                ranges[place] = SampleRange(0, start, start + samples)
                start += samples
            assignment = self.put(
                self.owner,
                Assignment(
                    job=job_id,
                    round=number,
                    term=1,
                    previous=previous,
                    base_state=blake3_hash(b"base %d" % number),
                    step=number * 10,
                    deadline_ms=60_000,
                    shares=tuple(Share(members[place], (ranges[place],)) for place in present),
                ),
            )
            took = ROUND_S * (1 + 0.12 * self.random.random())
            accepted, excluded = [], []
            for place in present:
                key, node = self.keys[place], self.keys[place].node_id.hex()
                if place == self.killed and number == death:
                    gone.add(place)
                    self.lane(place, Lane.COMPUTING, now, now + took / 3)
                    self.event(
                        now + took / 3, EventKind.DIED, place, f"{self.names[place]} did not answer for 6 s.", number
                    )
                    excluded.append(
                        Excluded(member=members[place], reason=f"{self.names[place]} was lost before it delivered.")
                    )
                    self.excluded[node] = self.excluded.get(node, 0) + 1
                    self.killed_s = now + took / 3
                    continue
                if self.random.random() < 0.15:
                    wait = took * 0.2
                    self.lane(place, Lane.WAITING, now, now + wait)
                else:
                    wait = took * 0.02
                    self.lane(place, Lane.WAITING, now, now + wait)
                send = took * (0.04 + 0.03 * self.random.random())
                self.lane(place, Lane.COMPUTING, now + wait, now + took - send)
                self.lane(place, Lane.SENDING, now + took - send, now + took)
                tokens = shares[place] * SEQUENCE_TOKENS
                contribution = self.put(
                    key,
                    Contribution(
                        job=job_id,
                        round=number,
                        term=1,
                        assignment=assignment,
                        member=members[place],
                        base_state=blake3_hash(b"base %d" % number),
                        update=blob(f"update {number} {place}"),
                        work=(NodeWork(key.node_id, shares[place], tokens, round(took * 900)),),
                        private_before=blake3_hash(b"before"),
                        private_after=blake3_hash(b"after"),
                        loss_first=2.0,
                        loss_last=1.9,
                        sketches=bytes(36),
                        engine=Engine("torch 2.13.0", "cpu", 1, 1),
                    ),
                )
                if place == self.liar and number == found:
                    reason = (
                        f"A replay of round {number - 2} gave another update: 0.214 apart, at most 1e-06 is honest."
                    )
                    excluded.append(Excluded(member=members[place], reason=reason, contribution=contribution))
                    self.excluded[node] = self.excluded.get(node, 0) + 1
                    self.event(
                        now + took, EventKind.EXCLUDED, place, f"{self.names[place]} was excluded: {reason}", number
                    )
                    self.lines.append(
                        AuditLine(
                            time_s=now + took,
                            round=number - 2,
                            node=node,
                            verdict=AuditVerdict.MISMATCH,
                            difference=0.214,
                            threshold=1e-6,
                            sentence=reason,
                        )
                    )
                    gone.add(place)
                    self.found_s = now + took
                    continue
                accepted.append(
                    Accepted(
                        member=members[place],
                        contribution=contribution,
                        update=blob(f"update {number} {place}"),
                        weight_ppm=0,
                        samples=shares[place],
                        tokens=tokens,
                    )
                )
                self.tokens[node] = self.tokens.get(node, 0) + tokens
                total += tokens
                if number % 9 == 4 and place == (number // 9) % 4 and place != self.liar:
                    self.lines.append(
                        AuditLine(
                            time_s=now + took,
                            round=number,
                            node=node,
                            verdict=AuditVerdict.MATCH,
                            difference=0.0,
                            threshold=0.0,
                            sentence="Bit for bit the same on the same software, device class and thread count.",
                        )
                    )
            now += took
            previous = self.put(
                self.owner,
                Commit(
                    job=job_id,
                    round=number,
                    term=1,
                    previous=previous,
                    assignment=assignment,
                    accepted=tuple(accepted),
                    excluded=tuple(excluded),
                    state=blake3_hash(b"state %d" % number),
                    tokens_total=total,
                ),
                durable=True,
            )
            loss = 1.62 + 3.9 * math.exp(-total / 160_000) + 0.5 * math.exp(-total / 1_200_000)
            self.lines.append(
                RoundMetrics(
                    round=number,
                    time_s=now,
                    tokens_total=total,
                    loss=loss + self.random.gauss(0, 0.035),
                    tokens_per_s=total / now,
                    members=len(accepted),
                    bytes_sent=41_000 * len(accepted),
                    bytes_received=41_000 * len(accepted) * 2,
                    inner_steps=10,
                    state=blake3_hash(b"state %d" % number).hex(),
                )
            )
            if number % 10 == 9:
                self.lines.append(Evaluation(round=number, time_s=now, tokens_total=total, loss=loss + 0.06))
        if self.killed is not None:
            self.lane(self.killed, Lane.GONE, self.killed_s, now)
        if self.liar is not None:
            self.lane(self.liar, Lane.EXCLUDED, self.found_s, now)
        self.wall_s = now
        self.total = total

    def figures(self) -> Figures:
        def ending(place: int) -> tuple[NodeStatus, str]:
            if place == self.killed:
                return NodeStatus.DIED, "Did not answer for 6 s; its samples went to others."
            if place == self.liar:
                return NodeStatus.EXCLUDED, "A replay showed that its updates were not computed from its assignment."
            if place == self.late:
                return NodeStatus.FINISHED, f"Joined at round {self.rounds // 2}."
            return NodeStatus.FINISHED, ""

        nodes = []
        for place, key in enumerate(self.keys):
            status, reason = ending(place)
            work = self.tokens.get(key.node_id.hex(), 0)
            nodes.append(
                NodeFigures(
                    node_id=key.node_id.hex(),
                    name=self.names[place],
                    status=status,
                    reason=reason,
                    speed=88.0 * self.speeds[place],
                    bytes_sent=3_600_000 + work // 9,
                    bytes_received=7_100_000 + work // 3,
                )
            )
        return Figures(
            wall_s=self.wall_s,
            unigram_loss=2.867,
            nodes=tuple(nodes),
            round_choice=RoundChoice(
                inner_steps=10,
                reason="10 inner steps: an exchange takes 0.12 s on the measured link and hides behind 1.6 s of work.",
                round_trip_ms=0.4,
                rate_bps=4.1e9,
            ),
            audit_count=AuditCount(chosen=30, replayed=9, dropped=21),
            replay_cost=ReplayCost(disk_bytes=182_000_000, opened_bytes=48_000_000),
            completion=Completion(
                prompt="def read(self, size):\n",
                text='    """Read the next bytes of the file."""\n    if self.closed:\n        return None\n',
            ),
            goal=Goal(reached=True, sentence="The held-out loss is at most 0.75 of the unigram baseline."),
        )

    def write(self, folder: RunFolder) -> None:
        """Everything into a new run folder."""
        folder.begin(self.job, b"data: {paths: [.]}\n")
        for envelope, durable in self.records:
            folder.append(envelope, durable=durable)
        for line in self.lines:
            folder.note(line)  # type: ignore[arg-type]
