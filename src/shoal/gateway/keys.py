"""API keys, and how much each may be used for. Rules: a key's file comes in as text, and moments in seconds.

A request is let in when its key has a place, a request and all the tokens that it may take; what it did not generate is
given back when it ends. Which limit holds it up, and until when, is said with the figures.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.errors import BadInput
from shoal.gateway.refusals import LimitReached
from shoal.quantities import BadQuantity, Bucket, parse_count

KEYS_MAX = 1024
KEY_MAX_BYTES = 256
LIMIT_MAX = 10**12
MINUTE_S = 60.0
PLACE_RETRY_S = 1.0
"""When to ask again where too many requests of a key are answered at once: nobody knows how long they take."""
_KEY = re.compile(r"[!-~]{1,256}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
FORM = "KEY [name=alice] [requests=60] [tokens=100000] [at-once=4]"


class BadKeys(BadInput):
    """A file of API keys cannot be used."""

    code = "SH-179"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, of which only the hash is kept, and what it may be used for; None is without limit."""

    digest: bytes
    name: str
    requests: int | None = None
    """A minute."""
    tokens: int | None = None
    """A minute, of prompts and answers together."""
    at_once: int | None = None

    @property
    def limited(self) -> bool:
        return self.requests is not None or self.tokens is not None


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def parse_keys(lines: Sequence[str], place: str) -> tuple[ApiKey, ...]:
    """A file of keys, one a line in the form of FORM; empty lines and those that begin with # are left out. `place`
    names it. Raises BadKeys with the line's number; a key itself is never said."""
    found: list[ApiKey] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        one = _parsed(words, f"{place}, line {number}", f"key-{len(found) + 1}")
        if any(one.digest == other.digest for other in found):
            raise BadKeys(f"{place}, line {number}: this key stands there already.")
        if any(one.name == other.name for other in found):
            raise BadKeys(f"{place}, line {number}: another key is called {one.name} already; give each its own name=.")
        found.append(one)
    if not 1 <= len(found) <= KEYS_MAX:
        raise BadKeys(f"{place} has {len(found)} keys; from 1 to {KEYS_MAX} can be used.")
    return tuple(found)


def _parsed(words: Sequence[str], where: str, name: str) -> ApiKey:
    given: dict[str, int] = {}
    named = None
    if not _KEY.fullmatch(words[0]) or re.match(r"(name|requests|tokens|at-once)=", words[0]):
        raise BadKeys(f"{where} does not begin with a key of up to {KEY_MAX_BYTES} printable ASCII characters: {FORM}")
    for at, word in enumerate(words[1:], 2):
        field_name, equals, value = word.partition("=")
        if field_name not in ("name", "requests", "tokens", "at-once") or not equals:
            raise BadKeys(f"{where}: word {at} is none of those that may follow a key: {FORM}")
        if field_name in given or (field_name == "name" and named is not None):
            raise BadKeys(f"{where}: {field_name}= stands there twice.")
        if field_name == "name":
            if not _NAME.fullmatch(value):
                raise BadKeys(f"{where}: a name has up to 48 letters, digits and ._- and begins with one of the first.")
            named = value
            continue
        try:
            given[field_name] = parse_count(value)
        except BadQuantity:
            given[field_name] = 0
        if not 1 <= given[field_name] <= LIMIT_MAX:
            raise BadKeys(f"{where}: {field_name}= is no count of at least 1, such as 60 or 100k.")
    return ApiKey(digest(words[0]), named or name, given.get("requests"), given.get("tokens"), given.get("at-once"))


@dataclass
class Account:
    """What a key has used."""

    key: ApiKey
    now: float
    running: int = 0
    requests: int = 0
    limited: int = 0
    """Requests that a limit held up."""
    prompt_tokens: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._requests = _bucket(self.key.requests, self.now)
        self._tokens = _bucket(self.key.tokens, self.now)

    def enter(self, prompt_tokens: int, tokens_max: int, now: float) -> None:
        """Let a request in that may generate up to `tokens_max`. Raises LimitReached, and then takes nothing."""
        try:
            self._check(prompt_tokens + tokens_max, now)
        except LimitReached:
            self.limited += 1
            raise
        if self._requests is not None:
            self._requests = self._requests.less(1)
        if self._tokens is not None:
            self._tokens = self._tokens.less(prompt_tokens + tokens_max)
        self.running += 1
        self.requests += 1
        self.prompt_tokens += prompt_tokens

    def leave(self, tokens: int, tokens_max: int, now: float) -> None:
        """A request that was let in is over, and has generated `tokens`."""
        self.running -= 1
        self.tokens += tokens
        self._see(now)
        if self._tokens is not None:
            self._tokens = self._tokens.more(max(0, tokens_max - tokens))

    def changed(self, key: ApiKey, now: float) -> None:
        """The key has other limits now. What was used of the old ones counts against them."""
        self._see(now)
        self._requests = _resized(self._requests, key.requests, now)
        self._tokens = _resized(self._tokens, key.tokens, now)
        self.key = key

    def headers(self, now: float) -> dict[str, str]:
        """How OpenAI says what is left, for each limit that there is."""
        self._see(now)
        said: dict[str, str] = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                said[f"x-ratelimit-limit-{what}"] = f"{bucket.size:.0f}"
                said[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level)))
                said[f"x-ratelimit-reset-{what}"] = duration(bucket.wait_s(bucket.size))
        return said

    def _see(self, now: float) -> None:
        self._requests = self._requests and self._requests.seen(now)
        self._tokens = self._tokens and self._tokens.seen(now)

    def _check(self, tokens: int, now: float) -> None:
        key, called = self.key, f"Key {self.key.name}"
        self._see(now)
        if key.tokens is not None and tokens > key.tokens:
            raise LimitReached(
                f"The request may take {tokens} tokens, prompt and answer together, and key {key.name} has "
                f"{key.tokens} a minute: it could never be let in. Ask for fewer with max_tokens, or shorten it.",
                "tokens", math.inf,
            )  # fmt: skip
        if key.at_once is not None and self.running >= key.at_once:
            raise LimitReached(
                f"{called} has {self.running} requests under way, and {key.at_once} may be at once; try again when "
                "one of them has ended.",
                "requests", PLACE_RETRY_S,
            )  # fmt: skip
        wait_s = self._requests.wait_s(1) if self._requests is not None else 0.0
        if wait_s:
            raise LimitReached(
                f"{called} may make {key.requests} requests a minute and has made them; try again in "
                f"{duration(wait_s)}.",
                "requests", wait_s,
            )  # fmt: skip
        wait_s = self._tokens.wait_s(tokens) if self._tokens is not None else 0.0
        if wait_s:
            left = max(0, math.floor(self._tokens.level if self._tokens is not None else 0))
            raise LimitReached(
                f"{called} has {left} of its {key.tokens} tokens a minute left, and the request may take {tokens}; try "
                f"again in {duration(wait_s)}.",
                "tokens", wait_s,
            )  # fmt: skip


@dataclass
class Keys:
    """The keys that are known, and their accounts."""

    accounts: list[Account] = field(default_factory=list)

    @classmethod
    def of(cls, keys: Sequence[ApiKey], now: float) -> Keys:
        return cls([Account(key, now) for key in keys])

    def find(self, key: str) -> Account | None:
        """Takes as long whichever key it is: all are looked at, and only hashes are compared."""
        asked, found = digest(key), None
        for account in self.accounts:
            if hmac.compare_digest(account.key.digest, asked):
                found = account
        return found

    def replace(self, keys: Sequence[ApiKey], now: float) -> None:
        """Other keys from now on. Who stays goes on with what was used."""
        known = {account.key.digest: account for account in self.accounts}
        self.accounts = []
        for key in keys:
            account = known.get(key.digest)
            if account is None:
                account = Account(key, now)
            elif account.key != key:
                account.changed(key, now)
            self.accounts.append(account)


def duration(seconds: float) -> str:
    """As OpenAI writes it: `20ms`, `8.64s`, `6m0s`. Rounded up, so that whoever waits so long is let in."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{rest}s"


def _bucket(limit: int | None, now: float) -> Bucket | None:
    return None if limit is None else Bucket.full(limit, limit / MINUTE_S, now)


def _resized(bucket: Bucket | None, limit: int | None, now: float) -> Bucket | None:
    fresh = _bucket(limit, now)
    if bucket is None or fresh is None:
        return fresh
    return fresh.less(min(fresh.size, max(0.0, bucket.size - bucket.level)))
