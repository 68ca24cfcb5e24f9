"""Looking at a job whose hosts are gone, or are not to be believed: what of the owner's folder is theirs to write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from job_world import job_text, parsed
from money_world import LEDGER, an_account
from test_run_folder import JOB

from shoal.driver.folder import FolderDamaged, FolderTaken, RunFolder
from shoal.driver.mirror import missing
from shoal.identity import KeyPair, load_or_create_key
from shoal.node.hosting import NotHosted
from shoal.protocol.driving import FileThere, FolderAsk, FolderGiven, Host, Phase, Piece
from shoal.protocol.messages import decode, encode
from shoal.protocol.money import EscrowTerms, Payee
from shoal.purse.bills import FILE as PAYMENTS
from shoal.purse.bills import Payments, TermPayments
from shoal.sdk.attached import AttachOptions, HostsSilent, OtherMoney, attach, stop_detached
from shoal.sdk.handed import FILE, Handed, handed, is_driven_by_nodes
from shoal.sdk.train import DRIVER_KEY, TrainOptions, new_folder, resume
from shoal.transport import TlsEndpoint
from shoal.world import Request, SystemClock, SystemDice


@dataclass
class Hosts:
    """Two hosts that say so, and give what they are told to."""

    ends: list[TlsEndpoint] = field(default_factory=list)
    phases: list[Phase | None] = field(default_factory=lambda: list[Phase | None](["driving", "standing by"]))
    """None: it does not have the job."""
    give: Callable[[tuple[FileThere, ...]], list[Piece]] = lambda _: []

    async def start(self) -> tuple[Host, ...]:
        hosts = list[Host]()
        for place in range(2):
            end = TlsEndpoint(KeyPair.generate(), clock=SystemClock(), dice=SystemDice())
            await end.listen("tcp://127.0.0.1:0")
            end.handle(FolderAsk.KIND, self._answer(place))
            self.ends.append(end)
            hosts.append(
                Host(node=end.node_id, driver=bytes([place] * 32), name=f"host-{place}", addresses=tuple(end.addresses))
            )
        return tuple(hosts)

    def _answer(self, place: int) -> Callable[[Request], Awaitable[bytes]]:
        async def answer(request: Request) -> bytes:
            asked = decode(FolderAsk, request.body, request.version)
            pieces = () if asked.standing_only else tuple(self.give(asked.files))
            phase = self.phases[place]
            if phase is None:
                raise NotHosted("What job?")
            given = FolderGiven(phase=phase, term=2 - place, pieces=pieces, sentence=f"So says {place}.")
            return encode(given, request.version)

        return answer


def looked_at(tmp_path: Path, story: Callable[[Hosts, Path], Awaitable[None]]) -> None:
    async def whole() -> None:
        hosts, at = Hosts(), tmp_path / "run"
        with RunFolder.create(at) as folder:
            load_or_create_key(at / DRIVER_KEY)
            kept = Handed(job=JOB.record_id, hosts=await hosts.start(), hubs=())
            folder.write(FILE, msgspec.json.encode(kept))
            folder.write("owner.json", b"{}")
            folder.begin(JOB, b"name: job")
        try:
            async with asyncio.timeout(60):
                await story(hosts, at)
        finally:
            for end in hosts.ends:
                await end.close()

    asyncio.run(whole())


@pytest.mark.parametrize("name", ["owner.json", "job.yaml", "job.record"])
def test_a_host_replaces_nothing_that_the_owner_made(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.sdk.attached.AGAIN_S", 0.01)
    evil = b'{"script": "model/evil.py"}'

    async def story(hosts: Hosts, at: Path) -> None:
        before = (at / name).read_bytes()
        hosts.give = lambda _: [Piece(name, 0, evil, len(evil), blake3(evil).digest())]
        with pytest.raises(HostsSilent, match=f"host-0 sends what does not fit together: .* another {name} than"):
            await attach(AttachOptions(at))
        assert (at / name).read_bytes() == before and is_driven_by_nodes(at)

    looked_at(tmp_path, story)


@pytest.mark.parametrize("forged", ["another", "budget", "none", "nonsense"])
def test_a_host_says_nothing_of_what_its_owner_set_aside(tmp_path: Path, forged: str) -> None:
    def set_aside(nonce: bytes, budget_micro: int = 1) -> bytes:
        me = an_account(50)
        terms = EscrowTerms(
            payer=me.address, signer=me.address, cap_micro=0, auditor=me.address, amount_micro=1, fee_ppm=0,
            holdback_ppm=0, notice_ms=0, audit_ms=0, expires_ms=1, payees=(Payee(me.address, 1),), quote=bytes(32),
            nonce=nonce,
        )  # fmt: skip
        term = TermPayments(terms=terms, ledger=LEDGER, signature=me.sign(terms.escrow_id(LEDGER)))
        return msgspec.json.encode(Payments(budget_micro=budget_micro, terms=(term,)))

    lies = {"another": set_aside(b"x" * 32), "budget": set_aside(bytes(32), 1000), "none": b'{"budget_micro":1}'}
    theirs = lies.get(forged, b"{")

    async def story(hosts: Hosts, at: Path) -> None:
        (at / PAYMENTS).write_bytes(set_aside(bytes(32)))
        hosts.give = lambda _: [Piece(PAYMENTS, 0, theirs, len(theirs), blake3(theirs).digest())]
        with pytest.raises(OtherMoney, match="says that other money was set aside"):
            await attach(AttachOptions(at))
        assert (at / PAYMENTS).read_bytes() == set_aside(bytes(32))

    looked_at(tmp_path, story)


def test_what_hosts_have_that_gave_up_comes_and_the_job_is_gone_on_with_here(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "events.jsonl").write_bytes(b'{"time_s":1.0,"sentence":"It began."}\n')

    async def story(hosts: Hosts, at: Path) -> None:
        hosts.phases = ["given up", "given up"]
        hosts.give = lambda there: missing(theirs, there)[0]
        assert await attach(AttachOptions(at)) is None
        assert (at / "events.jsonl").read_bytes() == (theirs / "events.jsonl").read_bytes()
        known = handed(at)
        assert known is not None and known.ended == "All hosts have given the job up: So says 0."
        assert not is_driven_by_nodes(at)

    looked_at(tmp_path, story)


def test_a_job_that_no_host_has_is_over(tmp_path: Path) -> None:
    async def story(hosts: Hosts, at: Path) -> None:
        hosts.phases = [None, None]
        await stop_detached(AttachOptions(at))
        known = handed(at)
        assert known is not None and known.ended == "All hosts have given the job up: host-0 does not have it."

    looked_at(tmp_path, story)


def test_a_run_that_nodes_drive_is_not_thrown_away(tmp_path: Path) -> None:
    async def story(hosts: Hosts, at: Path) -> None:
        options = TrainOptions(folder=at, hubs=(), key=KeyPair.generate(), replace=True)
        with pytest.raises(FolderTaken, match=r"Nodes drive the job in .*, stop it with `shoal jobs cancel`"):
            new_folder(options)
        hosts.phases = ["over", "over"]
        assert await attach(AttachOptions(at)) is None
        with new_folder(options) as folder:
            folder.begin(JOB, b"")
        assert not (at / FILE).exists()

    looked_at(tmp_path, story)


def test_a_note_that_cannot_be_read_is_no_run_of_ones_own(tmp_path: Path) -> None:
    async def story(hosts: Hosts, at: Path) -> None:
        (at / FILE).write_bytes(b"\xff")
        options = TrainOptions(folder=at, hubs=(), key=KeyPair.generate())
        with pytest.raises(FolderDamaged, match="detached.json, which says that nodes drive the job"):
            await resume(parsed(job_text(tmp_path), tmp_path), options)

    looked_at(tmp_path, story)


def test_a_run_that_was_never_handed_over_is_begun_anew(tmp_path: Path) -> None:
    at = tmp_path / "run"
    at.mkdir()
    (at / FILE).write_bytes(msgspec.json.encode(Handed(job=JOB.record_id, hosts=(), hubs=())))
    with new_folder(TrainOptions(folder=at, hubs=(), key=KeyPair.generate())) as folder:
        folder.begin(JOB, b"")
    assert not (at / FILE).exists()
