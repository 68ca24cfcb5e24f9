"""`shoal account`: money at a ledger, by whose it is, and bonds."""

from __future__ import annotations

import secrets
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import MONEY, Commands, Group, app
from shoal.cli.output import (
    NEGATIVE,
    SHORT,
    BadFlag,
    JsonFlag,
    LedgerFlag,
    err,
    out,
    print_json,
    run,
    say_fee,
    shown,
    when,
)
from shoal.errors import BadInput, BadRecord
from shoal.identity import ENVELOPE_OVERHEAD_BYTES, BadEnvelope, Envelope, KeyPair, load_key, node_id_from_hex, short_id
from shoal.identity.accounts import address_text, create_account
from shoal.ledger.bonds import Bond, BondOver, BondState, NoContradiction
from shoal.ledger.book import UnknownBond
from shoal.ledger.commands import (
    Admit,
    Close,
    Command,
    Deposit,
    Finish,
    Open,
    Pass,
    PayBack,
    PostBond,
    Redeem,
    SetFee,
    Slash,
    TopUp,
    Unbond,
    Withdraw,
    Withhold,
)
from shoal.ledger.moves import FEES, ISSUED, Move
from shoal.ledger.moves import account as account_name
from shoal.protocol.holds import Hold, sold_twice
from shoal.protocol.ledgers import MINTED, LedgerTicket
from shoal.protocol.messages import DEFAULT_NETWORK, open_record
from shoal.protocol.money import (
    BOND_LEAST_MICRO,
    BOND_NOTICE_LEAST_MS,
    BOND_NOTICE_MAX_MS,
    DAY_MS,
    BondTerms,
    Checkpoint,
    HouseLedger,
    Unbonding,
    Withdrawal,
    open_checkpoint,
)
from shoal.quantities import format_duration_s, parse_duration_s
from shoal.quantities.money import format_money, places_for
from shoal.sdk.local import shoal_home
from shoal.sdk.places import account_file, account_key, ledger_ticket, remember_ledger
from shoal.storage.whole import write_whole
from shoal.world import DirectoryDisk, SystemClock

if TYPE_CHECKING:
    from shoal.house import RemoteLedger
    from shoal.house.messages import AccountState
    from shoal.ledger.fees import Announced
    from shoal.ledger.journal import Line

T = TypeVar("T")
LIMIT_MAX = 10_000
REFERENCE_SHOWN = 28


class NoHold(BadInput):
    """A file that was named holds no node's signed hold."""

    code = "SH-138"


account_app = Commands(cls=Group, help="Your money at a ledger: `shoal account create`.")
app.add_typer(account_app, name="account", rich_help_panel=MONEY)


def ask(ticket: LedgerTicket, question: Callable[[RemoteLedger], Awaitable[T]]) -> T:
    """Link to a ledger, ask it something, and leave. Who asks is nobody in particular: what moves money is signed."""
    from shoal.house import RemoteLedger
    from shoal.transport import TlsEndpoint

    async def work() -> T:
        endpoint = TlsEndpoint(KeyPair.generate())
        try:
            return await question(RemoteLedger(endpoint, ticket, SystemClock()))
        finally:
            await endpoint.close()

    return run(work)


@account_app.command("create")
def create(ledger: LedgerFlag = None, json: JsonFlag = False) -> None:
    """Make an account: a key in ~/.shoal/account.key, which is whose the money is. Keep a copy of it.

    With `--ledger` the other commands find that ledger without a flag; so it is changed later, too. The key is one of
    Ethereum's kind, and the same account can be had at several ledgers.
    """  # fmt: skip
    ticket = None if ledger is None else LedgerTicket.parse(ledger)
    made = ticket is None or not account_file().exists()
    key = create_account(account_file()) if made else account_key()
    if ticket is not None:
        remember_ledger(ticket)
    address = address_text(key.address)
    if json:
        print_json({"account": address, "ledger": None if ticket is None else str(ticket), "made": made})
        return
    out.print(f"Account {address}{'' if made else ', as before'}.", markup=False, soft_wrap=True)
    if ticket is None:
        out.print("[dim]Its key is in[/] " + escape(str(account_file())), soft_wrap=True)
    else:
        out.print(f"Its ledger is that of {short_id(ticket.operator)}, in {ticket.currency}.", markup=False)


@account_app.command("balance")
def balance(ledger: LedgerFlag = None, json: JsonFlag = False) -> None:
    """Show how much your account has. What is in escrows or bonds, or held back, is not in it."""
    ticket, key = ledger_ticket(ledger), account_key()
    state = ask(ticket, lambda one: one.account(key.address))
    _print_balance(ticket, key.address, state, json)


@account_app.command("deposit", context_settings=NEGATIVE)
def deposit(
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="How much, such as 25 or 0.35.")],
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Have money from the development mint of a ledger, where its operator started it with one.

    Elsewhere the operator books what you paid it outside of the ledger; ask it how.
    """  # fmt: skip
    micro = places.amount_of(amount)
    ticket, key = ledger_ticket(ledger), account_key()

    async def work(one: RemoteLedger) -> AccountState:
        await one.mint(key.address, micro)
        return await one.account(key.address)

    state = ask(ticket, work)
    if json:
        _print_balance(ticket, key.address, state, json)
        return
    out.print(f"Deposit: {format_money(micro)} {ticket.currency}.", markup=False)
    out.print(f"There are {format_money(state.balance_micro)} {ticket.currency} now.", markup=False)


@account_app.command("withdraw", context_settings=NEGATIVE)
def withdraw(
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="How much, such as 25 or 0.35.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Where the operator pays it, as you have agreed: an address on a chain, the number of a payment. The "
            "journal shows it to strangers.",
        ),
    ],
    number: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Which withdrawal of the account it is. The same number again is carried out once at most.",
            show_default="the next",
        ),
    ] = None,
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Take money out of a ledger: its operator pays as much outside of it.

    Where the answer is lost, the sentence says with which `--number` to run it again: it is carried out once at most.
    """  # fmt: skip
    from shoal.house import OutcomeUnknown

    micro = places.amount_of(amount)
    ticket, key = ledger_ticket(ledger), account_key()
    if not (1 <= len(to) <= 128 and to.isascii() and to.isprintable()):
        raise BadFlag(f"--to {to[:40]!r} cannot be used: 1 to 128 printable ASCII characters.")
    if number is not None and not 1 <= number < 1 << 53:
        raise BadFlag(f"--number {number} cannot be used: withdrawals are counted from 1.")

    async def work(one: RemoteLedger) -> tuple[int, int]:
        which = number or (await one.account(key.address)).withdrawals + 1
        order = Withdrawal(account=key.address, amount_micro=micro, to=to, number=which)
        try:
            await one.apply(Withdraw(order, key.sign(order.digest(ticket.ledger))))
        except OutcomeUnknown as error:
            raise OutcomeUnknown(f"{error} The same again: the same command with --number {which}.") from error
        return which, await one.balance(key.address)

    which, left = ask(ticket, work)
    if json:
        print_json(
            {"withdrawal": which, "amount_micro": micro, "to": to, "currency": ticket.currency, "balance_micro": left}
        )
    else:
        out.print(
            f"Withdrawal {which}: {format_money(micro)} {ticket.currency}, to {to}.", markup=False, soft_wrap=True
        )
        out.print(f"There are {format_money(left)} {ticket.currency} left.", markup=False)


@account_app.command("bond", context_settings=NEGATIVE)
def bond(
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="How much, such as 25; one unit at least.")],
    node: Annotated[
        str | None,
        typer.Argument(metavar="NODE", help="Its NodeId, 64 digits.", show_default="the node of --data"),
    ] = None,
    notice: Annotated[
        str, typer.Option(metavar="TIME", help="From when you ask for it until it comes back: 1 to 30 days.")
    ] = "7d",
    data: Annotated[
        Path | None, typer.Option(help="The folder of a node on this machine.", show_default="~/.shoal/node")
    ] = None,
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Put money at stake for what a node promises: that it keeps no place for two clients at once.

    All of it is lost, to the ledger, as soon as anybody hands in two contradictory holds of that node (`shoal account
    slash`). `shoal account unbond` asks for it back.
    """  # fmt: skip
    from shoal.house import OutcomeUnknown

    micro, notice_ms = places.amount_of(amount), round(1000 * parse_duration_s(notice))
    if node is not None and data is not None:
        raise BadFlag("NODE and --data both name a node; leave one of them out.")
    key_file = (data or shoal_home() / "node") / "node.key"
    if node is None and not key_file.exists():
        raise BadFlag(f"No node has its key in {key_file.parent}: name its folder with --data, or its NodeId as NODE.")
    node_id = node_id_from_hex(node) if node is not None else load_key(key_file).node_id
    if micro < BOND_LEAST_MICRO:
        raise BadFlag(f"A bond of {format_money(micro)} is too small: {format_money(BOND_LEAST_MICRO)} at least.")
    if not BOND_NOTICE_LEAST_MS <= notice_ms <= BOND_NOTICE_MAX_MS:
        raise BadFlag(f"--notice {notice} cannot be used: from 1 to {BOND_NOTICE_MAX_MS // DAY_MS} days, such as 7d.")
    ticket, key = ledger_ticket(ledger), account_key()
    terms = BondTerms(
        account=key.address, network=DEFAULT_NETWORK, node=node_id, amount_micro=micro, notice_ms=notice_ms,
        nonce=secrets.token_bytes(32),
    )  # fmt: skip
    name = terms.bond_id(ticket.ledger)

    async def work(one: RemoteLedger) -> int:
        try:
            await one.apply(PostBond(terms, key.sign(name)))
        except OutcomeUnknown as error:
            raise OutcomeUnknown(f"{error} The same command again would post another bond.") from error
        return await one.bond_of(node_id)

    at_stake = ask(ticket, work)
    if json:
        print_json(
            {
                "bond": name, "node": node_id, "amount_micro": micro, "notice_ms": notice_ms,
                "currency": ticket.currency, "at_stake_micro": at_stake,
            }
        )  # fmt: skip
        return
    out.print(f"Bond {name.hex()[:SHORT]}: {format_money(micro)} {ticket.currency}.", markup=False)
    out.print(f"{format_money(at_stake)} is at stake for node {short_id(node_id)} in all.", markup=False)


@account_app.command("unbond")
def unbond(
    bond: Annotated[
        str, typer.Argument(metavar="BOND", help="Its name, or the beginning of it, from `shoal account statement`.")
    ],
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Ask for a bond. It comes back when its notice is over; until then it can be lost."""
    ticket, key = ledger_ticket(ledger), account_key()

    async def work(one: RemoteLedger) -> Bond:
        name = _bond_named(bond, (await one.account(key.address)).bonds)
        wish = Unbonding(name)
        await one.apply(Unbond(wish, key.sign(wish.digest(ticket.ledger))))
        return next(each for each in (await one.account(key.address)).bonds if each.bond_id == name)

    asked = ask(ticket, work)
    if json:
        print_json(_plain_bond(asked))
    else:
        out.print(f"{_say_bond(asked, ticket.currency)}.", markup=False, soft_wrap=True)


@account_app.command("slash")
def slash(
    one: Annotated[Path, typer.Argument(metavar="HOLD_A", help="A file with a node's signed hold.")],
    other: Annotated[Path, typer.Argument(metavar="HOLD_B", help="Another hold of that node, which contradicts it.")],
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Hand in two holds by which a node promised one place twice: every bond behind it is lost.

    Nothing of it comes to you. A file is a hold's envelope as the node signed it; docs/ledger.md says where a run's
    folder keeps them.
    """  # fmt: skip
    ticket = ledger_ticket(ledger)
    first, second = (_read_hold(path) for path in (one, other))
    proof = sold_twice(first, second)
    if proof is None:
        raise NoContradiction(
            f"{one} and {other} can both be kept: they are not of one node, for two places, for one client or not for "
            "one time, or the place was given back in between."
        )
    holds = (first.to_bytes(), second.to_bytes())
    lost, refusals = list[Bond](), list[str]()

    async def work(at: RemoteLedger) -> None:
        tried = set[bytes]()
        while fresh := [each for each in (await at.bonds_behind(first.signer)).bonds if each.bond_id not in tried]:
            for each in fresh:
                tried.add(each.bond_id)
                try:
                    await at.apply(Slash(each.bond_id, *holds))
                    lost.append(each)
                except (BondOver, NoContradiction) as error:
                    refusals.append(error.sentence)

    ask(ticket, work)
    if not lost and refusals:
        raise NoContradiction(f"{proof} No bond is lost by that: {refusals[0]}")
    if not lost:
        raise UnknownBond(f"{proof} No bond stands behind it at this ledger; the two holds prove it all the same.")
    micro = sum(each.terms.amount_micro for each in lost)
    if json:
        print_json(
            {"node": first.signer, "proof": proof, "lost": [each.bond_id for each in lost], "amount_micro": micro,
             "currency": ticket.currency, "refused": refusals}
        )  # fmt: skip
        return
    out.print(shown(proof), markup=False, soft_wrap=True)
    out.print(
        f"{len(lost)} bond{'s' * (len(lost) != 1)} of {format_money(micro)} {ticket.currency} lost.", markup=False
    )


def _bond_named(text: str, bonds: Sequence[Bond]) -> bytes:
    """Raises UnknownBond, also where several begin so."""
    found = [one.bond_id for one in bonds if one.bond_id.hex().startswith(text.lower())] if text else []
    if len(found) != 1:
        raise UnknownBond(
            f"{'Several bonds' if found else 'No bond'} of your account at this ledger "
            f"{'begin' if found else 'begins'} with {text[:64]!r}; `shoal account statement --json` names them."
        )
    return found[0]


def _read_hold(path: Path) -> Envelope:
    """Raises NoHold."""
    most = Hold.MAX_BYTES + ENVELOPE_OVERHEAD_BYTES
    with path.open("rb") as file:
        packed = file.read(most + 1)
    try:
        envelope = Envelope.from_bytes(packed, Hold.MAX_BYTES)
        open_record(envelope, Hold)
    except BadRecord as error:
        raise NoHold(f"{path} is no hold that a node has signed: {error.sentence}") from error
    return envelope


def _plain_bond(one: Bond) -> dict[str, object]:
    return {
        "bond": one.bond_id, "node": one.terms.node, "network": one.terms.network,
        "amount_micro": one.terms.amount_micro, "notice_ms": one.terms.notice_ms, "posted_ms": one.posted_ms,
        "ends_ms": one.ends_ms, "state": one.state.value,
    }  # fmt: skip


def _say_bond(one: Bond, currency: str) -> str:
    told = one.state.value
    if one.state is BondState.STANDING and one.ends_ms is not None:
        told = f"comes back {when(one.ends_ms)}"
    elif one.state is BondState.STANDING:
        told = f"stands, with {format_duration_s(one.terms.notice_ms / 1000)} of notice"
    return (
        f"Bond {one.bond_id.hex()[:SHORT]} behind node {short_id(one.terms.node)}: "
        f"{format_money(one.terms.amount_micro)} {currency}, {told}"
    )


@dataclass(frozen=True)
class _Entry:
    """A line of a statement; millionths."""

    line: Line
    change: int
    held: int
    """So much more is held back than before."""
    fee: int
    after: int
    """The balance."""
    lines: int = 1
    """Of the journal; `line` is the last of them."""

    def is_of_the_same(self, other: _Entry) -> bool:
        """Both are earnings from one escrow."""
        one, two = self.line.command, other.line.command
        if not isinstance(one, Redeem) or not isinstance(two, Redeem):
            return False
        return one.signed.voucher.escrow == two.signed.voucher.escrow

    def with_next(self, other: _Entry) -> _Entry:
        return _Entry(
            other.line, self.change + other.change, self.held + other.held, self.fee + other.fee, other.after,
            self.lines + other.lines,
        )  # fmt: skip


@account_app.command("statement")
def statement(
    limit: Annotated[int, typer.Option(metavar="N", help="The newest so many lines.")] = 50,
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show what came to your account and what left it, as the ledger's journal has it.

    Escrows and bonds are named by the beginning of their names, escrows as `shoal jobs show` and `shoal node earnings`
    name them; bonds stand below the lines. What one escrow paid several times in a row is one line. The lines are shown
    as the ledger gives them; `shoal account verify` checks them.
    """  # fmt: skip
    if not 1 <= limit <= LIMIT_MAX:
        raise BadFlag(f"--limit {limit} cannot be used: from 1 to {LIMIT_MAX}.")
    ticket, key = ledger_ticket(ledger), account_key()
    mine = account_name(key.address)

    async def work(one: RemoteLedger) -> tuple[int, deque[_Entry], tuple[Bond, ...], tuple[Announced, ...]]:
        newest, after, count = deque[_Entry](maxlen=limit), 0, 0
        async for line in one.lines(account=key.address):
            change = _change(line.moves, mine)
            after += change
            entry = _Entry(line, change, _held(line.moves, mine), _fee(line, mine), after)
            if newest and not json and newest[-1].is_of_the_same(entry):
                newest[-1] = newest[-1].with_next(entry)
            else:
                newest.append(entry)
                count += 1
        return count, newest, (await one.account(key.address)).bonds, await one.fees()

    count, newest, bonds, fees = ask(ticket, work)
    if json:
        print_json(
            {
                "account": mine, "currency": ticket.currency, "lines": count,
                "newest": [
                    {
                        "number": one.line.number, "at_ms": one.line.at_ms,
                        "what": _what(one.line.command, mine, ticket.ledger), "change_micro": one.change,
                        "held_micro": one.held, "fee_micro": one.fee, "balance_micro": one.after,
                    }
                    for one in newest
                ],
                "bonds": [_plain_bond(one) for one in bonds],
                "fees": [{"fee_ppm": one.table.fee_ppm, "from_ms": one.table.from_ms} for one in fees],
            }
        )  # fmt: skip
        return
    if not newest:
        out.print(f"Nothing has come to {mine} yet.", markup=False)
        return
    held = any(one.held > 0 for one in newest)
    columns = ("in", "out", *(["held back"] if held else []), "balance")
    table = Table("when", "what", *columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    places = places_for(amount for one in newest for amount in (one.change, one.held, one.after))
    for one in newest:
        what = _what(one.line.command, mine, ticket.ledger) + (f" {one.lines} times" if one.lines > 1 else "")
        what += f", fee {format_money(one.fee)}" if one.fee else ""
        figures = (one.change, -one.change, *([one.held] if held else []))
        table.add_row(
            when(one.line.at_ms), escape(shown(what)),
            *(format_money(micro, places) if micro > 0 else "" for micro in figures), format_money(one.after, places),
        )  # fmt: skip
    out.print(table)
    if count > len(newest):
        out.print(f"[dim]{count - len(newest)} older lines are left out; --limit shows more.[/]")
    for bond in bonds:
        out.print(_say_bond(bond, ticket.currency), markup=False, soft_wrap=True)
    for each in fees:
        said = say_fee(each.table, SystemClock().now_ms())
        out.print(f"The ledger takes {said}.", markup=False, soft_wrap=True)


@account_app.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")],
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Write a ledger's whole journal to a file, with what its operator signed of it: JSON, a line each.

    `shoal account verify FILE` checks it, on any machine.
    """  # fmt: skip
    ticket = ledger_ticket(ledger)
    try:
        target = file.open("xb")
    except FileExistsError as error:
        raise BadFlag(f"{file} is there already; name a new file.") from error
    with target:
        try:
            count = _fetch(ticket, target)
        except BaseException:
            file.unlink()
            raise
    if json:
        print_json({"file": str(file), "lines": count})
    else:
        out.print(f"{count} lines in {file}.", markup=False, soft_wrap=True)


@account_app.command("verify")
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A journal from `shoal account export`.", show_default=False)
    ] = None,
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Check a ledger's journal from its beginning: every line by the rules and the signatures in it.

    Without FILE it is fetched from the ledger. What the operator signed of it is kept in ~/.shoal/checkpoints, and
    compared with the next time: so an operator that changes its history is found out. Exit code 1 where anything is
    wrong.
    """  # fmt: skip
    from shoal.house.journals import checked, read_journal

    with file.open("rb") if file is not None else tempfile.TemporaryFile() as source:
        if file is None:
            _fetch(ledger_ticket(ledger), source)
            source.seek(0)
        head, lines = read_journal(source, "The journal" if file is None else str(file))
        if file is not None and ledger is not None and head.ledger != ledger_ticket(ledger).ledger:
            raise BadFlag(
                f"{file} is the journal of the ledger of {short_id(head.ledger.operator)} in {head.ledger.currency}, and "
                "not of the one that --ledger names; leave that out to check it all the same."
            )
        kept = KeptCheckpoint(head.ledger)
        newest, seen = head.signed, kept.read()
        found = kept.or_say_where(newest, lambda: checked(lines, head.ledger, newest, seen, of_now=file is None))
    now = None if newest is None else open_checkpoint(newest, head.ledger)
    before = None if seen is None else open_checkpoint(seen, head.ledger)
    if now is not None and (before is None or now.number > before.number):
        kept.write(newest)
    owed = -found.book.balances.get(ISSUED, 0)
    if json:
        print_json(
            {
                "ledger": head.ledger,
                "lines": found.lines,
                "owed_micro": owed,
                "signed": now,
                "seen_before": before,
                "as_seen": found.as_seen,
            }
        )
        return
    who = f"the ledger of {short_id(head.ledger.operator)} in {head.ledger.currency}"
    out.print(
        f"{found.lines} lines of {who}: all follow from the rules and the signatures.", markup=False, soft_wrap=True
    )
    out.print(f"It owes {format_money(owed)} {head.ledger.currency} in all.", markup=False)
    if now is not None:
        out.print(f"Its operator has signed line {now.number}.", markup=False)
    if before is not None and found.as_seen:
        out.print(f"It is the history that was seen before, up to line {before.number}.", markup=False)
    elif before is not None:
        out.print(
            f"It is older than what was seen before, up to line {before.number}, and was not compared with that: of two "
            "files, check the shorter one first.",
            markup=False, soft_wrap=True,
        )  # fmt: skip


class KeptCheckpoint:
    """The newest checkpoint of a ledger that this user has seen, in a file."""

    def __init__(self, ledger: HouseLedger) -> None:
        self._ledger = ledger
        self._path = shoal_home() / "checkpoints" / f"{ledger.operator.hex()}-{ledger.currency}"

    def read(self) -> Envelope | None:
        """Raises BadEnvelope where the file is damaged."""
        if not self._path.exists():
            return None
        with self._path.open("rb") as file:
            packed = file.read(Checkpoint.MAX_BYTES * 8)
        try:
            envelope = Envelope.from_bytes(packed, Checkpoint.MAX_BYTES)
            open_checkpoint(envelope, self._ledger)
        except BadRecord as error:
            raise BadEnvelope(
                f"{self._path} does not hold the checkpoint of this ledger that was kept there: {error} Restore it from "
                "a copy, or move it away: what was seen before is then not compared."
            ) from error
        return envelope

    def write(self, checkpoint: Envelope | None, path: Path | None = None) -> None:
        if checkpoint is None:
            return
        path = path or self._path
        write_whole(DirectoryDisk(path.parent), path.name, checkpoint.to_bytes(), "keeping what was seen of a ledger")

    def or_say_where(self, newest: Envelope | None, check: Callable[[], T]) -> T:
        """Where a check finds that history was changed, both checkpoints are kept: together they prove it."""
        from shoal.house.journals import HistoryChanged

        try:
            return check()
        except HistoryChanged as error:
            other = self._path.with_name(f"{self._path.name}.changed")
            self.write(newest, other)
            raise HistoryChanged(
                f"{error} Both checkpoints are kept, in {self._path} and {other}; keep the journal as well, with "
                "`shoal account export`, and put no more money there."
            ) from error


def _fetch(ticket: LedgerTicket, file: IO[bytes]) -> int:
    from shoal.house.journals import write_journal

    err.print("[dim]Fetching the journal.[/]")

    async def work(one: RemoteLedger) -> int:
        checkpoint = await one.checkpoint()
        return await write_journal(file, ticket.ledger, checkpoint, one.lines())

    return ask(ticket, work)


def _print_balance(ticket: LedgerTicket, address: bytes, state: AccountState, json: bool) -> None:
    if json:
        print_json(
            {"account": address_text(address), "currency": ticket.currency, "balance_micro": state.balance_micro,
             "bonds": [_plain_bond(one) for one in state.bonds]}
        )  # fmt: skip
    else:
        out.print(f"{format_money(state.balance_micro)} {ticket.currency}", markup=False)


def _change(moves: tuple[Move, ...], name: str) -> int:
    return sum(one.amount_micro * ((one.target == name) - (one.source == name)) for one in moves)


def _held(moves: tuple[Move, ...], name: str) -> int:
    """How much more of it is held back than before."""
    return sum(
        one.amount_micro * (_is_held(one.target, name) - _is_held(one.source, name)) for one in moves
    )  # fmt: skip


def _fee(line: Line, name: str) -> int:
    """Of what it was paid by this line, to the ledger."""
    pays = isinstance(line.command, Redeem)
    return sum(
        one.amount_micro for one in line.moves if one.target == FEES and (pays or _is_held(one.source, name))
    )  # fmt: skip


def _is_held(pot: str, name: str) -> bool:
    return pot.startswith("held ") and pot.endswith(f" {name}")


def _shortened(reference: str) -> str:
    """Where a deposit came from; what a mint has drawn to tell its deposits apart says nothing to people."""
    if reference.startswith(MINTED):
        return MINTED
    return reference if len(reference) <= REFERENCE_SHOWN else f"{reference[: REFERENCE_SHOWN - 3]}..."


def _what(command: Command, mine: str, ledger: HouseLedger) -> str:
    match command:
        case Deposit():
            return f"deposit, {_shortened(command.reference)}"
        case Withdraw():
            return f"withdrawal {command.order.number}, to {command.order.to}"
        case SetFee():
            return "what the ledger takes"
        case Open():
            return f"into escrow {command.terms.escrow_id(ledger).hex()[:SHORT]}"
        case Admit():
            return f"a payee more for escrow {command.admission.escrow.hex()[:SHORT]}"
        case TopUp():
            return f"more into escrow {command.order.escrow.hex()[:SHORT]}"
        case Finish():
            return f"no more wanted of escrow {command.word.escrow.hex()[:SHORT]}"
        case Redeem():
            return f"earned of escrow {command.signed.voucher.escrow.hex()[:SHORT]}"
        case Close():
            return f"closing escrow {command.wish.escrow.hex()[:SHORT]}"
        case Withhold():
            back = account_name(command.order.payee) != mine
            return f"withheld{' for you' if back else ''} of escrow {command.order.escrow.hex()[:SHORT]}"
        case Pass():
            return f"end of escrow {command.escrow.hex()[:SHORT]}"
        case PostBond():
            return f"bond behind node {short_id(command.terms.node)}"
        case Unbond():
            return f"asked for bond {command.wish.bond.hex()[:SHORT]} back"
        case Slash():
            return f"lost bond {command.bond.hex()[:SHORT]}: its node sold a slot twice"
        case PayBack():
            return f"bond {command.bond.hex()[:SHORT]} comes back"
