"""Keys and their limits: what a file may say, and that nobody gets more than that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gateway.keyfile import KeyFile
from shoal.gateway.keys import Account, ApiKey, BadKeys, Keys, digest, duration, parse_keys
from shoal.gateway.refusals import LimitReached
from shoal.quantities import Bucket
from shoal.world import HeldClock


def test_a_file_of_keys() -> None:
    lines = ["# mine", "", "s3cret", "other  name=alice requests=60 tokens=100k at-once=4", "x name=bob tokens=1"]
    assert parse_keys(lines, "keys.txt") == (
        ApiKey(digest("s3cret"), "key-1"),
        ApiKey(digest("other"), "alice", 60, 100_000, 4),
        ApiKey(digest("x"), "bob", None, 1),
    )
    assert "s3cret" not in repr(parse_keys(lines, "keys.txt"))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("topsecret requests=0", "requests= is no count"),
        ("topsecret requests=-1", "requests= is no count"),
        ("topsecret tokens=many", "tokens= is no count"),
        ("topsecret tokens=1e30", "tokens= is no count"),
        ("topsecret tokens=1 tokens=2", "tokens= stands there twice"),
        ("topsecret name=a name=b", "name= stands there twice"),
        ("topsecret name=", "a name has"),
        ("topsecret name=a/b", "a name has"),
        ("topsecret topsecret2", "word 2 is none of those"),
        ("topsecret speed=topsecret2", "word 2 is none of those"),
        ("tokens=5", "does not begin with a key"),
        ("topsecrét", "does not begin with a key"),
        ("topsecret" * 40, "does not begin with a key"),
        ("first", "stands there already"),
        ("topsecret name=alice", "another key is called alice"),
    ],
)
def test_a_bad_line_is_named_and_no_key_is_said(line: str, part: str) -> None:
    with pytest.raises(BadKeys, match=part) as refused:
        parse_keys(["first name=alice", "# one more", line], "keys.txt")
    assert "keys.txt, line 3" in refused.value.sentence and "topsecr" not in refused.value.sentence


def test_no_keys_and_too_many_are_refused() -> None:
    for lines in ([], ["# none"], [f"k{number}" for number in range(1025)]):
        with pytest.raises(BadKeys, match="keys; from 1 to 1024"):
            parse_keys(lines, "keys.txt")


@given(
    st.floats(0.5, 1e6),
    st.floats(0.01, 1e4),
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e6), st.floats(0, 1)), max_size=40),
)
def test_a_bucket_gives_no_more_than_its_size_and_what_flowed_in(
    size: float, per_s: float, asked: list[tuple[float, float, float]]
) -> None:
    bucket, now, net = Bucket.full(size, per_s, 0.0), 0.0, 0.0
    for pause, amount, back in asked:
        now += pause
        bucket = bucket.seen(now)
        wait_s = bucket.wait_s(amount)
        assert math.isinf(wait_s) == (amount > size)
        if wait_s == 0:
            bucket, net = bucket.less(amount).more(amount * back), net + amount * (1 - back)
        elif amount <= size:
            assert bucket.seen(now + wait_s).wait_s(amount) == 0, "who waits as long as was said gets it"
        assert net <= (size + per_s * now) * (1 + 1e-6)


limits = st.none() | st.integers(1, 500)
steps = st.lists(
    st.tuples(st.floats(0, 30), st.integers(1, 200), st.integers(1, 200), st.floats(0, 1), st.booleans()), max_size=40
)


@given(limits, limits, st.none() | st.integers(1, 5), steps)
def test_a_key_gets_no_more_than_its_limits(
    requests: int | None, tokens: int | None, at_once: int | None, asked: Sequence[tuple[float, int, int, float, bool]]
) -> None:
    account = Account(ApiKey(b"", "k", requests, tokens, at_once), 0.0)
    now, entered, used = 0.0, 0, 0
    under_way: list[tuple[int, int]] = []
    for pause, prompt, most, share, ends in asked:
        now += pause
        try:
            account.enter(prompt, most, now)
        except LimitReached as error:
            assert error.openai_code == "rate_limit_exceeded" and error.kind in ("requests", "tokens")
            assert math.isinf(error.retry_after_s) == (tokens is not None and prompt + most > tokens)
            assert account.headers(now) == account.headers(now), "a refusal takes nothing"
        else:
            entered += 1
            under_way.append((most, int(share * most)))
            used += prompt + int(share * most)
        if ends and under_way:
            most, generated = under_way.pop(0)
            account.leave(generated, most, now)
        assert account.running == len(under_way) <= (at_once or 10**9)
        assert requests is None or entered <= requests * (1 + now / 60) + 1e-6
        reserved = sum(most - generated for most, generated in under_way)
        assert tokens is None or used + reserved <= tokens * (1 + now / 60) + 1e-6
        said = account.headers(now)
        assert len(said) == 3 * sum(limit is not None for limit in (requests, tokens))
        assert all(int(said[name]) >= 0 for name in said if "remaining" in name)


def test_what_was_not_generated_is_given_back_and_what_is_left_is_said() -> None:
    account = Account(ApiKey(b"", "alice", 3, 600, 1), 0.0)
    account.enter(100, 500, 0.0)
    assert account.headers(0.0) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "20s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    with pytest.raises(LimitReached, match="1 requests under way, and 1 may be at once"):
        account.enter(1, 1, 0.0)
    account.leave(20, 500, 0.0)
    assert account.headers(0.0)["x-ratelimit-remaining-tokens"] == "480"
    with pytest.raises(
        LimitReached, match="has 480 of its 600 tokens a minute left, and the request may take 500"
    ) as no:
        account.enter(100, 400, 0.0)
    assert no.value.retry_after_s == pytest.approx(2)
    account.enter(100, 400, 2.0)
    account.leave(400, 400, 2.0)
    with pytest.raises(LimitReached, match="could never be let in"):
        account.enter(1, 600, 1000.0)
    assert (account.requests, account.limited, account.prompt_tokens, account.tokens) == (2, 3, 200, 420)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (8.64, "8.64s"), (59.9991, "1m0s"), (360, "6m0s"), (61.2, "1m2s")],
)
def test_durations_are_as_openai_writes_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_key_that_stays_keeps_what_it_has_used() -> None:
    keys = Keys.of(parse_keys(["a name=a tokens=100", "b name=b"], "keys"), 0.0)
    held = keys.find("a")
    assert held is not None and keys.find("c") is None
    held.enter(50, 40, 0.0)
    keys.replace(parse_keys(["c name=c", "a name=anna tokens=200 requests=5"], "keys"), 0.0)
    assert keys.find("a") is held and keys.find("b") is None and keys.find("c") is not None
    assert held.headers(0.0)["x-ratelimit-remaining-tokens"] == "110" and held.key.name == "anna"
    held.leave(0, 40, 0.0)
    assert held.headers(0.0)["x-ratelimit-remaining-tokens"] == "150"


def test_a_file_is_read_again_when_it_changed_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    file, clock, said = tmp_path / "keys", HeldClock(), []
    file.write_text("one\n")
    keys = KeyFile(file, clock, said.append)

    def known(key: str) -> bool:
        return keys().find(key) is not None

    file.write_text("one\ntwo\n")
    assert known("one") and not known("two"), "not looked at twice a second"
    asyncio.run(clock.advance(1.0))
    assert known("one") and known("two")
    file.write_text("three oops\n")
    asyncio.run(clock.advance(1.0))
    assert known("one") and known("two") and not known("three")
    file.unlink()
    asyncio.run(clock.advance(1.0))
    assert known("two")
    file.write_text("four\n")
    asyncio.run(clock.advance(1.0))
    assert known("four") and not known("one")
    assert "read again: 2 keys" in said[0] and "stay as they were" in said[1] and "line 1" in said[1]
    assert "cannot be read" in said[2] and len(said) == 4
