"""What a node has been paid, as the folder of its sales says it: read beside a node at work, and never written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import BadInput
from shoal.node.sales import ACCOUNTS, ENDED, Account, Ended, read_kept
from shoal.quantities.money import share
from shoal.world import DirectoryDisk


class NoSales(BadInput):
    """A folder that was named holds no sales of a node."""

    code = "SH-108"


@dataclass(frozen=True)
class EarnedOf:
    """One escrow; millionths, the ledger's fee included."""

    escrow: bytes
    client: bytes
    payer: bytes
    currency: str
    over: bool
    """The rest has gone back to its payer."""
    vouchers_micro: int
    """What its vouchers say."""
    redeemed_micro: int
    """Of that, brought to the ledger."""
    held_micro: int
    """Of that, held back until audits are over."""
    withheld_micro: int
    """Gone back to the payer, as far as the node has seen."""
    fee_ppm: int
    """Of what is paid, to the ledger."""
    ends_ms: int
    """When it ends, or has ended; for one that is open, at the latest."""
    settles_ms: int | None
    """When what is held back is paid; None while it is open."""

    @property
    def coming_micro(self) -> int:
        """Still to be paid: what is held back, and, of an open one, what is not redeemed yet."""
        return self.held_micro + (0 if self.over else self.vouchers_micro - self.redeemed_micro)

    @property
    def paid_micro(self) -> int:
        """To the node's account, and of that the fee to the ledger."""
        return self.redeemed_micro - self.held_micro - self.withheld_micro

    @property
    def fee_micro(self) -> int:
        """Of what was paid, to the ledger: to the millionth once what was held back is paid, too."""
        return share(self.paid_micro, self.fee_ppm)


@dataclass(frozen=True)
class InCurrency:
    """All escrows of one currency."""

    currency: str
    paid_micro: int
    coming_micro: int
    withheld_micro: int
    fee_micro: int
    """Of what was paid, to the ledger."""


@dataclass(frozen=True)
class Earned:
    escrows: tuple[EarnedOf, ...]
    """Open ones first; then those that are over, the newest first."""
    payees: dict[bytes, str]
    """The accounts at which it was paid, the newest last, and in which currency."""

    @property
    def totals(self) -> list[InCurrency]:
        return [
            InCurrency(
                currency,
                sum(one.paid_micro for one in self.escrows if one.currency == currency),
                sum(one.coming_micro for one in self.escrows if one.currency == currency),
                sum(one.withheld_micro for one in self.escrows if one.currency == currency),
                sum(one.fee_micro for one in self.escrows if one.currency == currency),
            )
            for currency in sorted({one.currency for one in self.escrows})
        ]

    def by_day(self, day_of: Callable[[int], str]) -> dict[tuple[str, str], int]:
        """What escrows that are over paid or still pay, less what was withheld: by the day on which each ended, as
        `day_of` names it, and currency; the newest first."""
        days: dict[tuple[str, str], int] = {}
        for one in self.escrows:
            if one.over:
                day = day_of(one.ends_ms), one.currency
                days[day] = days.get(day, 0) + one.redeemed_micro - one.withheld_micro
        return dict(sorted(days.items(), reverse=True))


def read_earned(folder: Path, now_ms: int) -> Earned:
    """Of the node in a folder. Raises NoSales, SalesDamaged."""
    place = folder / "sales"
    if not place.is_dir():
        raise NoSales(
            f"{folder} holds no sales: a node keeps them there once it was started with `--price`. Name another folder "
            "with --data."
        )
    disk = DirectoryDisk(place)
    ended = {one.escrow: one for one in read_kept(disk, ENDED, list[Ended], str(folder)) or ()}
    accounts = read_kept(disk, ACCOUNTS, list[Account], str(folder)) or []
    open_ones = [one for one in accounts if one.escrow not in ended]
    payees = {one.payee: one.currency for one in ended.values()}
    for account in open_ones:
        if account.newest is not None:
            payees.pop(account.newest.voucher.payee, None)
            payees[account.newest.voucher.payee] = account.currency
    return Earned(
        (
            *map(_of_open, sorted(open_ones, key=lambda one: one.ends_ms)),
            *(_of_ended(one, now_ms) for one in sorted(ended.values(), key=lambda one: -one.ended_ms)),
        ),
        payees,
    )


def _of_open(one: Account) -> EarnedOf:
    return EarnedOf(
        one.escrow, one.client, one.payer, one.currency, False, one.paid_micro, one.redeemed_micro, one.held_micro,
        one.withheld_micro, one.fee_ppm, one.ends_ms, None,
    )  # fmt: skip


def _of_ended(one: Ended, now_ms: int) -> EarnedOf:
    held = one.held_micro if now_ms < one.settles_ms else 0
    return EarnedOf(
        one.escrow, one.client, one.payer, one.currency, True, one.paid_micro, one.redeemed_micro, held,
        one.withheld_micro, one.fee_ppm, one.ended_ms, one.settles_ms,
    )  # fmt: skip
