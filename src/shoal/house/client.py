"""A house ledger as whoever needs one holds it: `world.Ledger` over a link."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.house.messages import (
    AccountState,
    Applied,
    ApplyCommand,
    AskAccount,
    AskBond,
    AskCheckpoint,
    AskEscrow,
    AskLedger,
    AskLines,
    BondsFound,
    EscrowState,
    LedgerInfo,
    LinesFound,
    Mint,
    NewestCheckpoint,
    NoMint,
    NotOverLinks,
)
from shoal.identity import Envelope, short_id
from shoal.ledger.book import NotSigned
from shoal.ledger.commands import Command
from shoal.ledger.escrows import Escrow
from shoal.ledger.fees import Announced, opened_table
from shoal.ledger.journal import Line
from shoal.ledger.moves import MoneyRefused, Move
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import DEFAULT_NETWORK, Message
from shoal.protocol.money import Checkpoint, HouseLedger, open_checkpoint
from shoal.storage.faults import LedgerBusy, LedgerFailed
from shoal.transport.allowances import TooManyRequests
from shoal.world import Clock, Dice, Endpoint, Link, LinkLost, OutcomeUnknown, Refused, SystemDice, Unreachable
from shoal.world.asking import ask

DIAL_DEADLINE_S = 10.0
REQUEST_DEADLINE_S = 20.0
PAGE_WAITS_MAX = 60
"""How often a page of the journal is asked for again, each a second after the one before, where the ledger says that
this comes too often, or that it is busy."""
A = TypeVar("A", bound=Message)
Question = AskLedger | AskAccount | AskEscrow | AskBond | AskLines | AskCheckpoint | ApplyCommand | Mint


class OtherLedger(LinkError):
    """Who answers at a ledger's address keeps another currency than its ticket says."""

    code = "SH-341"


def _and_below(kind: type[ShoalError]) -> Iterator[type[ShoalError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _and_below(one)


_OTHER_REFUSALS: tuple[type[ShoalError], ...] = (
    NotSigned, LedgerFailed, LedgerBusy, TooManyRequests, NoMint, NotOverLinks,
)  # fmt: skip
_REFUSALS = {one.code: one for one in (*_and_below(MoneyRefused), *_OTHER_REFUSALS)}
"""What a ledger says no with, by code; nothing has moved then. They are raised here as they would be beside it."""


class RemoteLedger:
    """One house ledger, dialled when it is first asked and again where the link broke. The endpoint is its maker's."""

    def __init__(
        self,
        endpoint: Endpoint,
        ticket: LedgerTicket,
        clock: Clock,
        *,
        dice: Dice | None = None,
        network: str = DEFAULT_NETWORK,
    ) -> None:
        self.ticket = ticket
        self._endpoint, self._clock, self._network = endpoint, clock, network
        self._dice = dice or SystemDice()
        self._link: Link | None = None

    @property
    def name(self) -> HouseLedger:
        return self.ticket.ledger

    async def apply(self, command: Command) -> tuple[Move, ...]:
        """Raises what the rules do, LedgerFailed, LedgerBusy; Unreachable, where nobody was asked; OutcomeUnknown."""
        return await self._move(ApplyCommand(command=command))

    async def mint(self, account: bytes, amount_micro: int) -> tuple[Move, ...]:
        """Of a ledger with a development mint. Raises NoMint, and what `apply` does."""
        nonce = self._dice.bytes(16)
        return await self._move(Mint(account=account, amount_micro=amount_micro, nonce=nonce))

    async def balance(self, account: bytes) -> int:
        return (await self.account(account)).balance_micro

    async def account(self, account: bytes) -> AccountState:
        """Balance, how many withdrawals there were, and its bonds."""
        return await self._ask(AskAccount(account=account), AccountState)

    async def escrow(self, escrow_id: bytes) -> Escrow | None:
        return (await self._ask(AskEscrow(escrow=escrow_id), EscrowState)).escrow

    async def bond_of(self, node: bytes, until_ms: int = 0) -> int:
        """Millionths that are at stake for what a node promises, beyond `until_ms`; see `Book.bond_of`."""
        return (await self.bonds_behind(node, until_ms)).at_stake_micro

    async def bonds_behind(self, node: bytes, until_ms: int = 0) -> BondsFound:
        return await self._ask(AskBond(node=node, network=self._network, until_ms=until_ms), BondsFound)

    async def fees(self) -> tuple[Announced, ...]:
        """As the operator signed them. Raises BadFeeTable, and what `open_record` does."""
        return tuple(opened_table(one, self.name, self._network) for one in (await self.about()).fees)

    async def about(self) -> LedgerInfo:
        return await self._ask(AskLedger(), LedgerInfo)

    async def checkpoint(self) -> Envelope | None:
        """Of its newest line, as the operator signed it; None while there is none. Raises BadCheckpoint, and what
        `open_record` does."""
        found = (await self._ask(AskCheckpoint(), NewestCheckpoint)).checkpoint
        if found is None:
            return None
        envelope = Envelope.from_bytes(found, Checkpoint.MAX_BYTES)
        open_checkpoint(envelope, self.name, self._network)
        return envelope

    async def lines(self, after: int = 0, account: bytes | None = None) -> AsyncIterator[Line]:
        """The journal after a line, page by page, as the ledger gives it: nothing of it is verified. With `account`,
        the lines in which that one is named."""
        while True:
            page = await self._page(AskLines(after=after, account=account))
            for line in page.lines:
                if line.number <= after:
                    raise BadRecord(f"{self} sent line {line.number} of its journal where one after {after} was due.")
                after = line.number
                yield line
            if page.seen is None:
                return
            if page.seen < after or not (page.lines or page.seen > after):
                raise BadRecord(f"{self} sent a page of its journal that leads nowhere.")
            after = page.seen

    async def _page(self, wanted: AskLines) -> LinesFound:
        for _ in range(PAGE_WAITS_MAX):
            try:
                return await self._ask(wanted, LinesFound)
            except (TooManyRequests, LedgerBusy):
                await self._clock.sleep(1)
        return await self._ask(wanted, LinesFound)

    def __str__(self) -> str:
        return f"The ledger of {short_id(self.ticket.operator)} in {self.ticket.currency}"

    # --- the link ----------------------------------------------------------------------------------------------------

    async def _dialled(self) -> Link:
        """The open link. Whoever answers has proved to be the operator. Raises Unreachable, OtherLedger."""
        if self._link is None or self._link.closed:
            try:
                link = await self._endpoint.dial(
                    self.ticket.operator, self.ticket.addresses, deadline_s=DIAL_DEADLINE_S
                )
            except Unreachable as error:
                raise Unreachable(
                    f"{self} does not answer: {error.sentence} Check that it runs, and that its ticket is the one it "
                    "printed at its start."
                ) from error
            info = await _request(link, AskLedger(), LedgerInfo)
            if info.ledger != self.name:
                raise OtherLedger(
                    f"{short_id(self.ticket.operator)} keeps a ledger in {info.ledger.currency}, and the ticket says "
                    f"{self.ticket.currency}; take its ticket as it printed it."
                )
            self._link = link
        return self._link

    async def _ask(self, question: Question, answer: type[A]) -> A:
        """Asking twice does no harm: where the link breaks, once more over a new one."""
        try:
            return await _request(await self._dialled(), question, answer)
        except LinkLost:
            return await _request(await self._dialled(), question, answer)

    async def _move(self, question: ApplyCommand | Mint) -> tuple[Move, ...]:
        link = await self._dialled()
        try:
            return (await _request(link, question, Applied)).moves
        except tuple(_REFUSALS.values()):
            raise
        except (LinkError, BadRecord) as error:
            if isinstance(error, Refused) and error.remote_code.startswith(("SH-1", "SH-2")):
                raise  # what it could not even read
            raise OutcomeUnknown(
                f"{self} was asked to move money and gave no answer that says whether it did: {error} What is signed "
                "is done once at most: hand the same in again, or look at the statement."
            ) from error


async def _request(link: Link, question: Question, answer: type[A]) -> A:
    """Raises LinkError, BadRecord where the answer is none, and what the ledger refuses with."""
    try:
        return await ask(link, question, answer, REQUEST_DEADLINE_S)
    except Refused as error:
        kind = _REFUSALS.get(error.remote_code)
        if kind is None:
            raise
        raise kind(error.sentence) from error
