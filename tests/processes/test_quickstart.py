"""The quickstart in a short form: real processes, one killed, one lying, and the folder it leaves."""

import asyncio
from pathlib import Path

import httpx
import msgspec
import pytest
from test_gateway import a_served

from shoal.driver.folder import RunFolder
from shoal.driver.lines import AuditLine, AuditVerdict
from shoal.driver.report import NodeStatus, Report
from shoal.driver.write_report import make_report
from shoal.identity import KeyPair, load_key
from shoal.identity.accounts import load_account
from shoal.ledger.journal import verified
from shoal.node.dishonest import LIES
from shoal.protocol.money import HouseLedger
from shoal.protocol.training import Contribution
from shoal.sdk.quickstart import (
    ASKED_TOKENS,
    BUDGET_MICRO,
    NODES,
    TEMPERATURE,
    Asked,
    QuickstartOptions,
    Truth,
    draw_truth,
    found_out,
    quickstart,
)
from shoal.sdk.replay import replay_round
from shoal.storage.ledgers import SqlLedger
from shoal.world import SeededDice, SystemClock

TOKENS = 150_000
SEED = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, Truth, Asked | None]:
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    options = QuickstartOptions(folder=folder, key=KeyPair.from_seed(b"q" * 32), seed=SEED, tokens=TOKENS, files_max=60)
    return folder, *asyncio.run(quickstart(options))


@pytest.fixture(scope="module")
def run(whole: tuple[Path, Report, Truth, Asked | None]) -> tuple[Path, Report, Truth]:
    return whole[:3]


def node(report: Report, name: str):  # type: ignore[no-untyped-def]
    return next(one for one in report.nodes if one.name == name)


@pytest.mark.timeout(600)
def test_it_trains_and_knows_who_died_and_who_lied(run: tuple[Path, Report, Truth]) -> None:
    folder, report, truth = run
    assert report.tokens_accepted >= TOKENS
    assert report.held_out_loss is not None and report.untrained_loss is not None
    assert report.held_out_loss < report.untrained_loss - 0.3  # a few rounds only
    assert node(report, truth.killed).status is NodeStatus.DIED
    assert truth.liar is not None
    liar = node(report, truth.liar)
    assert liar.status is NodeStatus.EXCLUDED and "replay" in liar.reason
    wronged = [one.name for one in report.nodes if one.status is NodeStatus.EXCLUDED and one.name != truth.liar]
    assert wronged == []
    assert "without having lied" not in found_out(report, truth)
    assert report.tokens_accepted == sum(one.tokens for one in report.nodes)
    for name in ("report.html", "report.json", "metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert (folder / name).stat().st_size > 0, name
    written = msgspec.json.decode((folder / "report.json").read_bytes())
    wanted = {"held_out_loss", "untrained_loss", "unigram_loss", "tokens_accepted", "rounds", "wall_s"}
    assert wanted | {"compute_fraction", "nodes"} <= written.keys()
    row = {"node_id", "name", "tokens", "bytes_sent", "bytes_received", "accepted_share", "status", "reason"}
    assert all(row <= one.keys() for one in written["nodes"])


@pytest.mark.timeout(600)
def test_it_ends_with_a_bill_that_adds_up_and_stands_in_the_ledger(run: tuple[Path, Report, Truth]) -> None:
    folder, report, truth = run
    bill = msgspec.json.decode((folder / "report.json").read_bytes())["bill"]
    assert bill["quoted"] == bill["charged"] + bill["refunded"] == BUDGET_MICRO and bill["currency"] == "USD"
    assert bill["charged"] == sum(line["paid"] for line in bill["nodes"]) > 0
    assert all({"name", "paid", "withheld", "reason"} <= line.keys() for line in bill["nodes"])
    assert {line["name"] for line in bill["nodes"]} >= {name for name, _ in NODES}
    worked = {one.name for one in report.nodes if one.tokens}
    assert {line["name"] for line in bill["nodes"] if line["paid"]} == worked
    withheld = {line["name"] for line in bill["nodes"] if line["withheld"]}
    assert withheld <= {truth.liar}

    data = folder / "local" / "ledger"
    name = HouseLedger(load_key(data / "operator.key").node_id, "USD")
    ledger = SqlLedger.open(data / "ledger.sqlite", name, SystemClock())
    try:
        book = verified(ledger.lines(), name)
    finally:
        ledger.close()
    assert sum(book.balances.values()) == 0
    (escrow,) = book.escrows.values()
    for line in bill["nodes"]:
        payee = load_account(folder / "local" / "accounts" / f"{line['name']}.key").address
        redeemed = escrow.paid[payee].redeemed_micro if payee in escrow.paid else 0
        assert redeemed == line["paid"] + line["withheld"], line["name"]


@pytest.mark.timeout(600)
def test_the_nodes_that_are_left_serve_what_they_trained(whole: tuple[Path, Report, Truth, Asked | None]) -> None:
    folder, report, truth, asked = whole
    assert asked is not None and asked.prompt == "def " and 0 < asked.answer_s < 60
    (name,) = asked.nodes  # a model this small is held whole
    assert name != truth.killed and name in {one.name for one in report.nodes}
    body = {"model": "small", "prompt": asked.prompt, "max_tokens": ASKED_TOKENS, "temperature": TEMPERATURE,
            "seed": SEED}  # fmt: skip
    with a_served(folder) as url:  # on this machine, what was just trained: the same words
        again = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert asked.text == again and asked.text


@pytest.mark.timeout(600)
def test_the_folder_alone_gives_the_report_again(run: tuple[Path, Report, Truth]) -> None:
    path, report, _ = run
    from shoal.driver.report import Figures

    with RunFolder.open(path, read_only=True) as folder:
        figures = folder.read("figures.json", Figures)
        assert figures is not None
        assert make_report(folder, figures) == report
        audits = list(folder.notes(AuditLine))
    assert any(line.verdict is AuditVerdict.MISMATCH for line in audits)


@pytest.mark.timeout(600)
def test_anyone_can_replay_the_liar_and_an_honest_node_from_the_folder(run: tuple[Path, Report, Truth]) -> None:
    path, _, truth = run
    honest = next(name for name, _ in NODES if name not in (truth.liar, truth.killed))
    verdicts = {}
    for name in (truth.liar, honest):
        assert name is not None
        result = asyncio.run(
            replay_round(
                path,
                1,
                name,
                key=KeyPair.from_seed(b"r" * 32),
                hubs=[],
                clock=SystemClock(),
                dice=SeededDice(1),
            )
        )
        verdicts[name] = result.verdict
    assert verdicts == {truth.liar: "mismatch", honest: "match"}
    with RunFolder.open(path, read_only=True) as folder:
        assert sum(1 for _ in folder.opened(Contribution)) > 4


def test_the_seed_alone_draws_who_dies_and_who_lies_and_how() -> None:
    drawn = [draw_truth(seed, honest=False) for seed in range(60)]
    assert drawn == [draw_truth(seed, honest=False) for seed in range(60)]
    assert all(truth.killed != truth.liar for truth in drawn)
    assert {truth.lie for truth in drawn} == set(LIES)
    assert draw_truth(1, honest=True).liar is None
