"""Money: whole millionths of a currency's unit, never a fraction of one and never a float.

A name ends in `_micro`; a price is millionths per hour (`_micro_per_h`). Sums that somebody owes are rounded in favour
of who pays, once, from the whole time that has passed: what is owed does not depend on how often it was looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from shoal.quantities.units import BadQuantity

MICRO = 1_000_000
AMOUNT_MAX = (1 << 63) - 1
"""Of an account, an escrow, an entry: what a column of SQL holds."""
_AMOUNT = re.compile(r"\s*([0-9]{1,40})(?:\.([0-9]{1,6}))?\s*\Z")
_SHARE = re.compile(r"\s*([0-9]{1,3})(?:\.([0-9]{1,4}))?\s*%\s*\Z")
_PRICE = re.compile(r"(.*?)\s*/\s*(h|hour|s|second|d|day)\s*\Z", re.DOTALL)
_SECONDS = {"s": 1, "second": 1, "h": 3600, "hour": 3600, "d": 86_400, "day": 86_400}
MS_PER_H = 3_600_000


def parse_money(text: str | int | float) -> int:
    """`"0.35"` -> 350000; a number as YAML has it is read as it is written. Raises BadQuantity for what is negative,
    has more than six places, or is more than AMOUNT_MAX."""
    match = None if isinstance(text, bool) else _AMOUNT.match(str(text))
    if match is None:
        raise BadQuantity(f"{text!r} is no amount of money; write for example '0.35', with at most six places.")
    amount = int(match[1]) * MICRO + int((match[2] or "").ljust(6, "0"))
    if amount > AMOUNT_MAX:
        raise BadQuantity(f"{text!r} is more money than can be counted: at most {format_money(AMOUNT_MAX)}.")
    return amount


def format_money(micro: int, places: int = 2) -> str:
    """350000 -> `"0.35"`, -1500000 -> `"-1.50"`: so many places or as many as it takes."""
    whole, rest = divmod(abs(micro), MICRO)
    return f"{'-' if micro < 0 else ''}{whole}.{f'{rest:06}'.rstrip('0').ljust(places, '0')}"


def places_for(amounts: Iterable[int]) -> int:
    """With so many places the points of all of them stand beneath one another in a table: two to six."""
    return max((len(format_money(one).rpartition(".")[2]) for one in amounts), default=2)


def parse_share(text: str) -> int:
    """`"2%"` -> 20000 parts per million. Raises BadQuantity for more than 100 %, and beyond four places."""
    match = _SHARE.match(text)
    ppm = 0 if match is None else int(match[1]) * 10_000 + int((match[2] or "").ljust(4, "0"))
    if match is None or ppm > MICRO:
        raise BadQuantity(f"{text!r} is no share; write for example '2%' or '0.5%', with at most four places.")
    return ppm


def format_share(ppm: int) -> str:
    """20000 -> `"2 %"`."""
    return f"{ppm / 10_000:g} %"


def parse_price(text: str) -> int:
    """`"0.35/h"` -> 350000 millionths per hour; per second and per day, too. Raises BadQuantity: also for what makes no
    whole millionth an hour."""
    match = _PRICE.match(text) if isinstance(text, str) else None
    if match is None:
        raise BadQuantity(f"{text!r} is no price; write for example '0.35/h'.")
    price, rest = divmod(parse_money(match[1]) * 3600, _SECONDS[match[2]])
    if rest:
        raise BadQuantity(f"{text!r} is no whole number of millionths an hour; write it per hour.")
    if price > AMOUNT_MAX:
        raise BadQuantity(f"{text!r} is more money than can be counted: at most {format_money(AMOUNT_MAX)}.")
    return price


def format_price(micro_per_h: int) -> str:
    """350000 -> `"0.35/h"`."""
    return f"{format_money(micro_per_h)}/h"


def owed(micro_per_h: int, passed_ms: int) -> int:
    """For so much time at so much an hour, rounded down."""
    return micro_per_h * passed_ms // MS_PER_H


def share(micro: int, parts_per_million: int) -> int:
    """Of an amount, rounded down."""
    return micro * parts_per_million // MICRO
