"""Taking over a job from its records: a driver that was killed starts again, or another one that the grant names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from shoal.driver.account import say_if_older
from shoal.driver.chain import Chain, read_record
from shoal.driver.folder import RunFolder
from shoal.driver.lines import AuditLine, AuditVerdict, RoundMetrics
from shoal.driver.training import JobRecords
from shoal.errors import BadRecord, JobError, LinkError
from shoal.identity import Envelope, KeyPair
from shoal.protocol.messages import decode, encode, open_record, sign
from shoal.protocol.training import Assignment, Commit, Grant, Head, HeadAsk
from shoal.rounds.standing import Standing
from shoal.rounds.succession import choose_head, may_drive, next_term, rebuild
from shoal.storage import BlobStore
from shoal.training.outer import OuterStep, WeighedUpdate
from shoal.training.state import SharedState
from shoal.training.updates import decode_update
from shoal.world import Clock, Endpoint

HEAD_DEADLINE_S = 5.0
ASKED_MAX = 64


class CannotTakeOver(JobError):
    """A job's records do not let this driver go on with it."""

    code = "SH-634"


@dataclass(frozen=True)
class TakenOver:
    """Where the job stands, and the records of the term that begins now."""

    records: JobRecords
    standing: Standing
    state: SharedState
    retired: Mapping[bytes, str]
    """NodeId -> why it takes no part any more."""


async def take_over(
    folder: RunFolder,
    *,
    key: KeyPair,
    endpoint: Endpoint,
    store: BlobStore,
    clock: Clock,
    reach: Callable[[Sequence[bytes]], Awaitable[None]],
    gone: Collection[bytes] = (),
    alone: bool = False,
) -> TakenOver:
    """Begin the next term on the newest Commit of the folder's chain. `reach` opens links to nodes that worked for the
    job, so that they can be asked whether they hold a newer one. Who follows another driver needs the promise of most
    of them to follow that one no longer, those left out that are `gone` with it, or all where it is left `alone`.
    Raises CannotTakeOver, StorageError."""
    chain = await asyncio.to_thread(read_record, folder)
    older = say_if_older(folder, folder.notes(RoundMetrics), (commit for commit, _, _ in chain.commits))
    if older is not None:
        raise CannotTakeOver(older)
    if chain.grant is None:
        raise CannotTakeOver(f"{folder.path} holds no grant; begin the job anew.")
    grant = open_record(chain.grant, Grant, folder.job.network)
    allowed = may_drive(grant, key.node_id, None, 0, 0, clock.now_ms())
    if not allowed.allowed:
        raise CannotTakeOver(allowed.sentence)
    former = list(dict.fromkeys(chain.node_of.values()))
    await reach(former)
    heir = chain.driver not in (None, key.node_id)
    answers = await _heads(former, folder, endpoint, chain.term_number + 1 if heir else None)
    if heir and not alone:
        _check_promises(chain, answers, gone)
    unheard = _unheard(chain, store) if heir else []
    last = chain.commits[-1][0].round if chain.commits else -1
    heads = list(answers.values())
    own = chain.commits[-1][1] if chain.commits else None
    choice = choose_head(folder.job.record_id, grant, [own, *heads], folder.job.network)
    if choice.round > last:
        raise CannotTakeOver(
            f"Members hold the Commit of round {choice.round}, which {folder.path} lacks, or an update that leads to "
            "it; restore the newest copy of the folder."
        )
    if unheard:
        taken_back = {envelope.record_id for _, envelope, _ in unheard}
        await asyncio.to_thread(folder.take_back, taken_back, unheard[0][0].round)
    standing = rebuild(
        chain.record.job,
        folder.job.record_id,
        [(commit, envelope.record_id, assignment) for commit, envelope, assignment in chain.commits],
    )
    state = await asyncio.to_thread(_state_after, chain, store)
    term_record = next_term(folder.job.record_id, chain.grant.record_id, standing, chain.term_number)
    term = sign(key, term_record, folder.job.network)
    folder.append(term, durable=True)
    retired = {
        bytes.fromhex(line.node): line.sentence
        for line in folder.notes(AuditLine)
        if line.verdict is AuditVerdict.MISMATCH
    }
    records = JobRecords(
        folder.job,
        chain.grant,
        term,
        term_record.number,
        commits=tuple(envelope for _, envelope, _ in chain.commits),
        former=tuple(former),
    )
    return TakenOver(records, standing, state, retired)


def _check_promises(chain: Chain, answers: Mapping[bytes, Envelope | None], gone: Collection[bytes]) -> None:
    """Raises CannotTakeOver unless most of those whose work counted last have promised to follow this driver."""
    last = {chain.node_of[entry.member] for entry in chain.commits[-1][0].accepted} if chain.commits else set()
    last -= set(gone) - answers.keys()
    promised = len(last & answers.keys())
    if 2 * promised < len(last):
        raise CannotTakeOver(
            f"{promised} of the {len(last)} members whose work counted last have promised to follow no older driver; "
            "the others cannot be reached, or have heard of theirs just now."
        )


def _unheard(chain: Chain, store: BlobStore) -> list[tuple[Commit, Envelope, Assignment]]:
    """Takes out of the chain the last Commits of a driver before this one, where their updates are not here: it has
    died before they came, and before any member heard of them. Where one did hear, its head says so, and what is on
    the disk stays."""
    sound = next(
        (at for at, (commit, _, _) in enumerate(chain.commits)
         if not all(store.has(entry.update.hash) for entry in commit.accepted)),
        len(chain.commits),
    )  # fmt: skip
    unheard = chain.commits[sound:]
    del chain.commits[sound:]
    return unheard


async def _heads(
    former: Sequence[bytes], folder: RunFolder, endpoint: Endpoint, term: int | None
) -> dict[bytes, Envelope | None]:
    """What members that can be reached over open links report as their newest Commit, by node; with a `term`, of those
    that promise to follow no older one."""

    async def ask(node: bytes) -> tuple[bytes, Envelope | None] | None:
        link = endpoint.links().get(node)
        if link is None or link.closed:
            return None
        body = encode(HeadAsk(job=folder.job.record_id, term=term), link.version)
        try:
            answer = await link.request(HeadAsk.KIND, body, deadline_s=HEAD_DEADLINE_S, reply_max_bytes=Head.MAX_BYTES)
            packed = decode(Head, answer, link.version).commit
            return node, Envelope.from_bytes(packed, Head.MAX_BYTES) if packed else None
        except (LinkError, BadRecord):
            return None

    answers = await asyncio.gather(*(ask(node) for node in former[-ASKED_MAX:]))
    return dict(one for one in answers if one is not None)


def _state_after(chain: Chain, store: BlobStore) -> SharedState:
    """The shared state that the newest Commit names, computed from the start state and the accepted updates."""
    job = chain.record.job
    state = SharedState.from_bytes(store.read(job.model.start.hash), "The start state")
    outer = OuterStep(job.rounds)
    for commit, _, _ in chain.commits:
        updates = [
            WeighedUpdate(
                decode_update(
                    store.read(entry.update.hash), job.rounds.codec, state.layout.size, job.rounds.sparse_keep
                ),
                entry.weight_ppm,
                entry.scale_ppm,
            )
            for entry in commit.accepted
        ]
        state = outer.apply(state, updates)
        if state.hash != commit.state:
            raise CannotTakeOver(
                f"The updates of round {commit.round} do not lead to the state that its Commit names; "
                "restore the folder from a copy."
            )
    return state
