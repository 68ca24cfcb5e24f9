"""`shoal market` as people meet it, against an auction in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.main import main
from shoal.identity import Envelope, KeyPair, load_or_create_key
from shoal.identity.accounts import AccountKey, address_text
from shoal.protocol.holds import Hold, open_hold
from shoal.protocol.orders import HOUR_MS, ORDER_MAX_BYTES, Ask, open_order
from shoal.protocol.prices import Price

NOBODY = KeyPair.from_seed(bytes(32)).node_id.hex()
AUCTION, LEDGER = f"shoal-auction://{NOBODY}@127.0.0.1:9", f"shoal-ledger://{NOBODY}@127.0.0.1:9/USD"
HOUR, LATER = ((datetime.now(UTC) + timedelta(hours=ahead)).strftime("%Y-%m-%dT%H") for ahead in (30, 31))
KIND = "H100 [80] 80 GiB, DE"
NEVER, SOON = "1h", "100ms"

Shoal = Callable[..., tuple[int, str, str]]
"""A command -> exit code, standard output, standard error."""


@pytest.fixture
def shoal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shoal:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("SHOAL_LEDGER", LEDGER)
    for name in ("SHOAL_AUCTION", "SHOAL_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return call


def done(outcome: tuple[int, str, str]) -> Any:
    """What a command with --json printed."""
    code, out, err = outcome
    assert code == 0, out + err
    return json.loads(out)


@contextmanager
def processes(*commands: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Commands that run until they are stopped, and what each said when it was ready."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "shoal", *words, "--json", "--with-parent", str(os.getpid())],
            stdout=subprocess.PIPE, text=True,
        )
        for words in commands
    ]  # fmt: skip
    try:
        yield [json.loads(one.stdout.readline()) for one in running if one.stdout is not None]
    finally:
        for one in running:
            one.terminate()
        for one in running:
            assert one.wait(60) == 0
            assert one.stdout is not None
            one.stdout.close()


@contextmanager
def a_process(*words: str) -> Iterator[dict[str, Any]]:
    with processes(words) as [ready]:
        yield ready


def until(shoal: Shoal, running: int) -> None:
    """Until the batch before this one is published."""
    for _ in range(1000):
        if done(shoal("market", "show", "--json"))["running"] >= running:
            return
    raise AssertionError(f"Batch {running - 1} was not closed.")


NODES = ("cheap", "dear")
PAID_AT = {name: address_text(AccountKey(bytes([number] * 32)).address) for number, name in enumerate(NODES, 1)}


@pytest.fixture
def world(shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """A hub, a ledger at which this user has 25 USD, and two nodes that sell."""
    with processes(
        ("hub", "--data", str(tmp_path / "hub"), "--http", ""),
        ("ledger", "start", "--data", str(tmp_path / "ledger"), "--mint-max", "100"),
    ) as [hub, ledger]:
        monkeypatch.setenv("SHOAL_LEDGER", ledger["ticket"])
        monkeypatch.setenv("SHOAL_HUB", hub["ticket"])
        done(shoal("account", "create", "--json"))
        done(shoal("account", "deposit", "25", "--json"))
        with processes(
            *(
                ("node", "start", "--data", str(tmp_path / name), "--device", "cpu", "--price", "0.50/h", "--account",
                 PAID_AT[name])
                for name in NODES
            )
        ) as nodes:  # fmt: skip
            yield dict(zip(NODES, nodes, strict=True))


def test_hours_are_sold_and_bought_kept_and_passed_on(
    shoal: Shoal, world: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Two nodes ask and one buyer bids while batches take an hour; then they take a tenth of a second."""
    data, keys = tmp_path / "auction", {name: ready["node"] for name, ready in world.items()}
    terms = ("--class", KIND, "--hour", HOUR)

    def sell(name: str, price: str, *more: str) -> tuple[int, str, str]:
        return shoal("market", "sell", *terms, "--price", price, "--data", name, "--account", PAID_AT[name], *more)

    with a_process("market", "run", "--data", str(data), "--every", NEVER) as ready:
        assert ready["ready"] == "auction"
        ticket = ready["ticket"]
        code, out, _ = sell("cheap", "0.30", "--auction", ticket)
        assert code == 0 and re.search(
            rf"^Order [0-9a-f]{{12}} sells H100 \[80\] 80 GiB, DE, open, {HOUR}:00 UTC for 0.30 USD or more. It is in "
            r"batch 2, which is closed in (1 h 0|59) min.*; then: shoal market mine\n$", out
        ), out  # fmt: skip
        second = done(sell("dear", "0.35", "--json"))
        kept = open_order(Envelope.from_bytes(Path(second["file"]).read_bytes(), ORDER_MAX_BYTES))
        assert isinstance(kept, Ask) and kept.terms.limit_micro == 350_000 and second["batch"] == 2
        code, _, err = shoal("market", "sell", *terms, "--price", "1", "--data", "cheap")
        assert code == 1 and f"This node is paid at {PAID_AT['cheap']}" in err
        code, out, _ = shoal("market", "buy", *terms, "--price", "0.40", "--blocks", "1")
        assert code == 0 and "buys H100 [80] 80 GiB, DE" in out and "for 0.40 USD or less" in out
        assert done(shoal("account", "balance", "--json"))["balance_micro"] == 24_600_000
        code, _, err = shoal("market", "buy", *terms, "--price", "400", "--blocks", "2")
        assert code == 2 and "SH-191" in err
        assert len(done(shoal("market", "mine", "--json"))["waiting"]) == 3
        assert shoal("market", "mine")[1].count("was signed for batch 2, which is open.") == 3
        code, out, _ = shoal("market", "show")
        assert code == 0 and "0 orders. Batch 2 is open." in out and "Nothing was traded." in out

        load_or_create_key(tmp_path / "home" / "node" / "node.key")
        code, _, err = shoal("market", "sell", "--hour", HOUR, "--price", "0.30")
        assert code == 2 and "has no offer at the hubs" in err and "has to be up" in err
        as_offered = (
            "market",
            "sell",
            "--hour",
            LATER,
            "--price",
            "0.30",
            "--data",
            "dear",
            "--account",
            PAID_AT["dear"],
        )
        order = done(shoal(*as_offered, "--json"))
        envelope = Envelope.from_bytes(Path(order["file"]).read_bytes(), ORDER_MAX_BYTES)
        kind = open_order(envelope).terms.block.of
        assert envelope.signer.hex() == keys["dear"]
        assert kind.device and kind.device in " ".join(world["dear"]["devices"]) and kind.memory_gib >= 1

    listen = f"tcp://{ticket.partition('@')[2]}"
    with a_process("market", "run", "--data", str(data), "--every", SOON, "--listen", listen) as ready:
        assert ready["ticket"] == ticket
        until(shoal, 3)
        found = done(shoal("market", "show", "2", "--save", "2.batch", "--json"))
        [cleared] = found["cleared"]
        assert cleared["price_micro"] == 350_000
        assert {trade["node"] for trade in cleared["trades"]} == {keys["cheap"]}
        code, out, _ = shoal("market", "show", "2")
        assert code == 0 and f"H100 [80] 80 GiB, DE, open, {HOUR}:00 UTC" in out and "sets-price" in out
        assert keys["cheap"][:8] in out and "0.35 USD" in out and "4 orders. Batch 3 is open." in out
        code, out, _ = shoal("market", "mine", "--data", "cheap")
        assert code == 0 and re.search(r"^2 +sold +H100", out, re.M) and re.search(r"^2 +bought +H100", out, re.M)
        assert out.count("is in batch 2") == 4
        assert out.count("is kept for you; the money is in escrow") == 1
        assert re.search(r"above the price comes back from 20\d\d-.* UTC on, with: shoal market mine", out)
        mine = done(shoal("market", "mine", "--data", "dear", "--json"))
        assert [one["what"] for one in mine["trades"]] == ["bought"] and not any(
            one["missing"] for one in mine["orders"]
        )
        assert {one["order"] for one in mine["orders"]} <= set(found["orders"])
        for hour in mine["hours"]:
            hold = open_hold(
                Envelope.from_bytes(Path(hour["hold"]).read_bytes(), Hold.MAX_BYTES), bytes.fromhex(hour["node"])
            )
            assert hold.price == Price(350_000) and hold.escrow is not None and hold.escrow.hex() == hour["escrow"]
            assert hold.until_ms - hold.from_ms == HOUR_MS and hold.from_ms == hour["block"]["start_ms"]
        assert done(shoal("account", "balance", "--json"))["balance_micro"] == 24_600_000, (
            "what the bid was above the price comes back once the bid has expired"
        )
        code, _, err = sell("cheap", "0.10")
        assert code == 1 and "This hour was sold in batch 2" in err
        assert shoal("market", "verify", "2.batch", "--order", second["file"])[0] == 0
        assert shoal("market", "show", "2", "--save", "2.batch")[0] == 2, "a file that is there"
        late = Path(second["file"]).with_name(f"{2:016}-late.order")
        late.write_bytes(sign_late(Path("dear"), kept))
        code, out, _ = shoal("market", "mine")
        assert code == 4 and "was signed for batch 2 and is not in it" in out
        code, _, err = shoal("market", "show", "9")
        assert code == 2 and "SH-157" in err and "is open" in err

        code, _, err = shoal("market", "resell", "--hour", HOUR, "--price", "0.34")
        assert code == 2 and "SH-156" in err and "was promised 0.35 for this hour" in err
        resale = done(shoal("market", "resell", "--hour", HOUR, "--price", "0.35", "--blocks", "1", "--json"))
        until(shoal, resale["batch"] + 1)
        assert "0 of 1 blocks" in shoal("market", "mine")[1], "nobody wants it"


def sign_late(folder: Path, order: Ask) -> bytes:
    """An order for a batch that is closed already, which its auctioneer never saw."""
    from msgspec.structs import replace

    from shoal.protocol.messages import sign

    key = load_or_create_key(folder / "node.key")
    return sign(key, replace(order, terms=replace(order.terms, limit_micro=1))).to_bytes()


SELL, BUY = ["market", "sell", "--hour", HOUR], ["market", "buy", "--hour", HOUR]
TO = ["--auction", AUCTION]
MISTAKES = [
    pytest.param([*BUY, "--class", KIND, "--price", "1"], "SH-155", "SHOAL_AUCTION", id="no auction"),
    pytest.param([*BUY, "--class", KIND, "--price", "1", "--auction", LEDGER], "SH-112", "auction's", id="no ticket"),
    pytest.param([*BUY, "--class", KIND, "--price", "1", *TO], "SH-301", "127.0.0.1:9", id="nobody there"),
    pytest.param([*BUY, "--class", "H100", "--price", "1", *TO], "SH-103", "DEVICE N GiB", id="no class"),
    pytest.param([*BUY, "--class", "\udcff 80 GiB", "--price", "1", *TO], "SH-103", "DEVICE N GiB", id="no text"),
    pytest.param([*BUY, "--class", "0 x H100 80 GiB", "--price", "1", *TO], "SH-103", ">= 1", id="no devices"),
    pytest.param([*BUY, "--class", KIND, "--price", "0", *TO], "SH-103", "nothing", id="for nothing"),
    pytest.param([*BUY, "--class", KIND, "--price", "1000001", *TO], "SH-103", "at most 1000000", id="too dear"),
    pytest.param([*BUY, "--class", KIND, "--price", "1", "--blocks", "0", *TO], "SH-103", "1 to 1024", id="no blocks"),
    pytest.param(["market", "buy", "--class", KIND, "--price", "1", "--hour", "noon"], "SH-103", "2026", id="no hour"),
    pytest.param(
        ["market", "buy", "--class", KIND, "--price", "1", "--hour", "2026-01-01T00"], "SH-103", "begun", id="too late"
    ),
    pytest.param(
        ["market", "buy", "--class", KIND, "--price", "1", "--hour", "9999-12-31T23"], "SH-103", "30 days", id="too far"
    ),
    pytest.param([*SELL, "--price", "1", "--class", KIND, *TO], "SH-110", "node.key", id="no node"),
    pytest.param(["market", "show", "0", *TO], "SH-103", "from 1", id="batch 0"),
    pytest.param(["market", "mine", "--last", "0", *TO], "SH-103", "from 1", id="no batches"),
    pytest.param(["market", "run", "--every", "0s"], "SH-103", "to a day", id="without an end"),
    pytest.param(["market", "run", "--every", "often"], "SH-101", "no", id="no time"),
    pytest.param(["market", "run", "--listen", "tcp://0.0.0.0:1"], "SH-103", "dial", id="wildcard"),
]


@pytest.mark.parametrize(("words", "code", "said"), MISTAKES)
def test_a_mistake_is_a_sentence(shoal: Shoal, words: list[str], code: str, said: str) -> None:
    ended, out, err = shoal(*words)
    assert ended == (1 if code == "SH-301" else 2), err
    assert out == "" and code in err and said in err
    ended, out, _ = shoal(*words, "--json")
    error = json.loads(out)["error"]
    assert error["code"] == code and said in error["sentence"]
