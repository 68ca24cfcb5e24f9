"""Keys with limits, as the official client of OpenAI meets them, and at the queue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from test_gateway import GENEROUS_S, PROMPT, a_served, expected
from test_stages import a_checkpoint

from shoal.models.tokenizers import ByteTokenizer
from shoal.world import SystemClock


class TurnedClock(SystemClock):
    """Stands still, but for what a test turns it by; waiting takes as long as it does."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_checkpoint(
        tmp_path_factory.mktemp("served") / "model", "llama", vocab_size=257, eos_token_id=256,
        max_position_embeddings=1 << 18,
    )  # fmt: skip
    ByteTokenizer().save(folder)
    return folder


KEYS = """\
# who may ask
open
a name=alice requests=3
b name=bob tokens=200
c name=carol at-once=1
"""


@pytest.fixture
def served(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[str, TurnedClock, Path]]:
    clock, file = TurnedClock(), tmp_path / "keys"
    file.write_text(KEYS)
    with a_served(checkpoint, clock, key_file=file) as url:
        yield url, clock, file


def client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=GENEROUS_S, max_retries=0)


def test_limits_are_429_in_openais_shape_with_what_is_left(
    served: tuple[str, TurnedClock, Path], checkpoint: Path
) -> None:
    url, clock, file = served
    alice, bob = client(url, "a"), client(url, "b")

    def ask(who: openai.OpenAI, tokens: int = 4) -> httpx.Headers:
        raw = who.completions.with_raw_response.create(model="small", prompt=PROMPT, max_tokens=tokens, temperature=0)
        assert raw.parse().choices[0].text
        return raw.headers

    for left in (2, 1, 0):
        headers = ask(alice)
        assert headers["x-ratelimit-limit-requests"] == "3" and "x-ratelimit-limit-tokens" not in headers
        assert headers["x-ratelimit-remaining-requests"] == str(left)
        assert headers["x-ratelimit-reset-requests"] == ("1m0s" if left == 0 else f"{20 * (3 - left)}s")
    with pytest.raises(openai.RateLimitError, match="Key alice may make 3 requests a minute") as limited:
        ask(alice)
    assert limited.value.code == "rate_limit_exceeded" and limited.value.type == "requests"
    assert limited.value.response.headers["retry-after"] == "20"
    assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert alice.models.with_raw_response.list().headers["x-ratelimit-remaining-requests"] == "0", "looking is free"
    clock.seconds += 20
    ask(alice)

    headers = ask(bob, 100)
    assert headers["x-ratelimit-remaining-tokens"] == str(200 - len(PROMPT) - 100)
    first = expected(checkpoint, PROMPT, 1)
    cut = bob.completions.with_raw_response.create(
        model="small", prompt=PROMPT, max_tokens=80, temperature=0, stop=first
    )
    generated = cut.parse().usage.completion_tokens  # type: ignore[union-attr]
    left = 200 - 2 * len(PROMPT) - 100 - generated
    assert generated < 80 and cut.headers["x-ratelimit-remaining-tokens"] == str(left), "the rest was given back"
    with pytest.raises(openai.RateLimitError, match=f"has {left} of its 200 tokens a minute left") as limited:
        ask(bob, 90)
    wait_s = (len(PROMPT) + 90 - left) * 60 / 200
    assert limited.value.type == "tokens" and int(limited.value.response.headers["retry-after"]) == math.ceil(wait_s)
    clock.seconds += wait_s
    ask(bob, 90)
    with pytest.raises(openai.RateLimitError, match="could never be let in") as limited:
        ask(bob, 250)
    assert limited.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in limited.value.response.headers
    with pytest.raises(openai.BadRequestError):
        ask(bob, 1 << 20)
    assert "x-ratelimit-limit-requests" not in ask(client(url, "open"))

    figures = httpx.get(f"{url}/metrics", headers={"authorization": "Bearer open"}).text
    assert 'shoal_key_requests_total{key="alice"} 4.0' in figures
    assert 'shoal_key_requests_limited_total{key="bob"} 2.0' in figures
    assert 'shoal_key_tokens_total{key="key-1"} 4.0' in figures

    file.write_text("a name=alice requests=3\nnew\n")
    clock.seconds += 1
    ask(client(url, "new"))
    with pytest.raises(openai.AuthenticationError):
        bob.models.list()


def test_a_key_has_so_many_requests_at_once(served: tuple[str, TurnedClock, Path]) -> None:
    url, _, _ = served
    carol = client(url, "c")
    stream = carol.completions.create(model="small", prompt=PROMPT, max_tokens=200_000, temperature=0, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="1 may be at once"):
        carol.completions.create(model="small", prompt=PROMPT, max_tokens=2)
    stream.close()
    while True:  # its place is free as soon as the endpoint has seen that it hung up
        try:
            assert carol.completions.create(model="small", prompt=PROMPT, max_tokens=2).usage
            break
        except openai.RateLimitError:
            continue
