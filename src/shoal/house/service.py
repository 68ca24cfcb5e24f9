"""What a house ledger answers on its links.

Whoever asks has proved its NodeId, which gives it nothing here but its share of the ledger's time: what moves money is
signed by whom it names. A deposit says that the operator has got money, and is nobody's to say over a link; what the
time brings, the ledger sees to by itself.
"""

from __future__ import annotations

from importlib.metadata import version

from shoal.house.messages import (
    PAGE_BYTES,
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
from shoal.identity import KeyPair
from shoal.ledger.commands import Deposit, Pass
from shoal.ledger.moves import account as account_name
from shoal.protocol.ledgers import MINTED
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode, sign
from shoal.protocol.money import Checkpoint, HouseLedger
from shoal.quantities.money import format_money
from shoal.storage.faults import LedgerBusy
from shoal.storage.group_commit import GroupCommit
from shoal.transport.allowances import AtOnce, RateLimit
from shoal.world import Clock, Endpoint, Request

COMMANDS_PER_S, COMMANDS_BURST = 100.0, 1000
QUESTIONS_PER_S, QUESTIONS_BURST = 50.0, 500
PAGES_PER_S, PAGES_BURST = 10.0, 100
MINTS_PER_S, MINTS_BURST = 0.5, 10
"""What one peer may ask for."""
AT_ONCE_PER_SOURCE = 128
"""Requests under way from one address, whatever keys ask."""
PAGE_PLACES, COMMAND_PLACE_BYTES = 32, 4096
"""So many of these a page of the journal takes, and one each begun 4 KiB of a command: others wait while the ledger
reads forty milliseconds for a page, or takes fourteen for an escrow of a thousand payees."""


class LedgerService:
    """Answers `ledger.about`, `.apply`, `.mint`, `.account`, `.escrow`, `.bond_of`, `.lines` and `.checkpoint` on an
    endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: GroupCommit,
        name: HouseLedger,
        key: KeyPair,
        clock: Clock,
        *,
        network: str = DEFAULT_NETWORK,
        mint_max_micro: int = 0,
    ) -> None:
        """`key` is the operator's; `mint_max_micro` is 0 for a ledger without a development mint."""
        self._ledger, self._name, self._key, self._network = ledger, name, key, network
        self._mint_max_micro = mint_max_micro
        self._commands = RateLimit(clock, COMMANDS_PER_S, COMMANDS_BURST)
        self._questions = RateLimit(clock, QUESTIONS_PER_S, QUESTIONS_BURST)
        self._pages = RateLimit(clock, PAGES_PER_S, PAGES_BURST)
        self._mints = RateLimit(clock, MINTS_PER_S, MINTS_BURST)
        self._at_once = AtOnce(AT_ONCE_PER_SOURCE, LedgerBusy)
        endpoint.handle(AskLedger.KIND, self._tell_about_itself)
        endpoint.handle(ApplyCommand.KIND, self._apply)
        endpoint.handle(Mint.KIND, self._mint)
        endpoint.handle(AskAccount.KIND, self._tell_account)
        endpoint.handle(AskEscrow.KIND, self._tell_escrow)
        endpoint.handle(AskBond.KIND, self._tell_bond)
        endpoint.handle(AskLines.KIND, self._give_lines)
        endpoint.handle(AskCheckpoint.KIND, self._sign_checkpoint)

    async def _tell_about_itself(self, request: Request) -> bytes:
        self._questions.spend(request.peer, "A question")
        decode(AskLedger, request.body, request.version)
        with self._at_once.place(request.source, "requests"):
            (lines, _), fees = await self._ledger.ask(lambda ledger: (ledger.last(), ledger.fees()))
        info = LedgerInfo(
            ledger=self._name, network=self._network, software=f"shoal {version('shoal')}", lines=lines,
            mint_max_micro=self._mint_max_micro, fees=tuple(one.signed for one in fees),
        )  # fmt: skip
        return encode(info, request.version)

    async def _apply(self, request: Request) -> bytes:
        self._commands.spend(request.peer, "A command")
        command = decode(ApplyCommand, request.body, request.version).command
        if isinstance(command, Deposit):
            raise NotOverLinks("A deposit is booked by the operator of a ledger, on its machine, and not over a link.")
        if isinstance(command, Pass):
            raise NotOverLinks("What the time brings for an escrow, a ledger sees to by itself.")
        with self._at_once.place(request.source, "requests", 1 + len(request.body) // COMMAND_PLACE_BYTES):
            return encode(Applied(moves=await self._ledger.apply(command)), request.version)

    async def _mint(self, request: Request) -> bytes:
        self._mints.spend(request.peer, "A wish for money")
        wish = decode(Mint, request.body, request.version)
        if not self._mint_max_micro:
            raise NoMint("This ledger has no development mint: its operator books what was paid outside of it.")
        if wish.amount_micro > self._mint_max_micro:
            raise NoMint(
                f"The development mint of this ledger gives {format_money(self._mint_max_micro)} "
                f"{self._name.currency} at a time, not {format_money(wish.amount_micro)}."
            )
        reference = f"{MINTED} {wish.nonce.hex()}"
        with self._at_once.place(request.source, "requests"):
            moves = await self._ledger.apply(Deposit(wish.account, wish.amount_micro, reference))
        return encode(Applied(moves=moves), request.version)

    async def _tell_account(self, request: Request) -> bytes:
        self._questions.spend(request.peer, "A question")
        account = decode(AskAccount, request.body, request.version).account
        with self._at_once.place(request.source, "requests"):
            balance, withdrawals, bonds = await self._ledger.ask(
                lambda ledger: (
                    ledger.balance(account_name(account)), ledger.withdrawals(account), ledger.bonds_by(account)
                )
            )  # fmt: skip
        return encode(AccountState(balance_micro=balance, withdrawals=withdrawals, bonds=bonds), request.version)

    async def _tell_escrow(self, request: Request) -> bytes:
        self._questions.spend(request.peer, "A question")
        name = decode(AskEscrow, request.body, request.version).escrow
        with self._at_once.place(request.source, "requests"):
            return encode(EscrowState(escrow=await self._ledger.escrow(name)), request.version)

    async def _tell_bond(self, request: Request) -> bytes:
        self._questions.spend(request.peer, "A question")
        asked = decode(AskBond, request.body, request.version)
        of = (asked.node, asked.network, asked.until_ms)
        with self._at_once.place(request.source, "requests"):
            found = await self._ledger.ask(
                lambda ledger: BondsFound(at_stake_micro=ledger.bond_of(*of), bonds=ledger.bonds_behind(*of))
            )
        return encode(found, request.version)

    async def _give_lines(self, request: Request) -> bytes:
        self._pages.spend(request.peer, "A question for the journal")
        wanted = decode(AskLines, request.body, request.version)
        naming = None if wanted.account is None else account_name(wanted.account)
        with self._at_once.place(request.source, "requests", PAGE_PLACES):
            page = await self._ledger.ask(lambda ledger: ledger.page(wanted.after, PAGE_BYTES, naming))
        return encode(LinesFound(lines=page.lines, seen=page.seen), request.version)

    async def _sign_checkpoint(self, request: Request) -> bytes:
        """Of a line that has been written: one that was lost after it was signed would look like one taken away."""
        self._questions.spend(request.peer, "A question")
        decode(AskCheckpoint, request.body, request.version)
        with self._at_once.place(request.source, "requests"):
            number, hash = await self._ledger.ask(lambda ledger: ledger.last())
        if not number:
            return encode(NewestCheckpoint(), request.version)
        checkpoint = Checkpoint(currency=self._name.currency, number=number, hash=hash)
        envelope = sign(self._key, checkpoint, self._network)
        return encode(NewestCheckpoint(checkpoint=envelope.to_bytes()), request.version)
