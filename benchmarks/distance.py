"""Rings of stages over distance, measured (`rings.py` has the ground).

**rings**: gateway and three stages, each on a host of its own, all the same time apart: milliseconds a token for one
stream, against the sum of what the stages compute and the four crossings; the same with guesses on a text that repeats
itself, with several streams at once, and with the gateway beside a stage.

**losses**: the same with a fourth node to spare. While streams are under way a stage is killed (SIGKILL), or its link
goes dead without a word; the longest gap in a stream, and whether each says what it says undisturbed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from results_form import figure
from rings import SESSIONS, Reading, Rings
from serving_model import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.inference.blocks import kept_bytes
from shoal.models.configs import read_config
from shoal.models.shapes import survey

ONE_WAY_MS = (15.0, 40.0)
RING_GOAL = 1.15
KILLED_GOAL_S, SILENT_GOAL_S = 1.5, 3.0
CONTEXT = 2048
TOGETHER = 8


def ring_model(folder: Path, spread: float) -> int:
    """A model of 25 M parameters that reads bytes; gives what a node offers so that it can hold less than half of it,
    but the weights of all of it beside the cache of a stage. `spread` of the weights: a small one repeats itself."""
    torch.manual_seed(1)
    shape = {**SIZES["25M"], "vocab_size": 257}
    config = AutoConfig.for_model("llama", max_position_embeddings=CONTEXT, initializer_range=spread,
                                  eos_token_id=None, pad_token_id=0, **shape)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    found = survey(read_config(folder), sorted(folder.glob("*.safetensors")))
    head_size = shape["hidden_size"] // shape["num_attention_heads"]
    cache = SESSIONS * kept_bytes(1, shape["num_key_value_heads"], head_size, CONTEXT)
    ends = found.first_bytes + found.last_bytes
    return int(2 * (3.9 * (max(found.layer_bytes) + cache) + ends))  # of a processor's memory a half is used


def bodies(count: int, tokens: int) -> list[dict[str, object]]:
    """Requests of which every other one is greedy."""
    return [
        {"prompt": f"def function_{number}(value, other):\n    return value", "max_tokens": tokens,
         "temperature": 0 if number % 2 == 0 else 1, "seed": number, "logit_bias": {"256": -100}}
        for number in range(count)
    ]  # fmt: skip


def over_distance(given: argparse.Namespace) -> list[dict[str, object]]:
    figures = []
    for one_way_ms in ONE_WAY_MS[:1] if given.quick else ONE_WAY_MS:
        for beside in (False, True):
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                memory = ring_model(folder / "model", 0.05)
                with Rings(folder / "shoal", folder / "model", one_way_ms=one_way_ms, nodes=3, memory_bytes=memory,
                           beside_first=beside) as rings:  # fmt: skip
                    rings.serve("--no-guess")
                    rings.until(1)
                    measure = beside_a_stage if beside else alone_and_together
                    figures += measure(rings, one_way_ms, *((12, 2) if given.quick else (48, 5)))
                    if not beside:
                        ring_model(folder / "repeats", 0.02)
                        figures.append(on_a_text_that_repeats(rings, folder / "repeats", one_way_ms))
    return figures


def alone_and_together(rings: Rings, one_way_ms: float, tokens: int, streams: int) -> list[dict[str, object]]:
    name, bare = f"ring/{one_way_ms:g}ms", 4 * one_way_ms
    readings = [rings.readings([body])[0] for body in bodies(streams, tokens)]
    times, firsts = [one.token_ms for one in readings], [1000 * one.first_s for one in readings]
    middle, (computing, loaded) = statistics.median(times), rings.computing_ms
    share = middle / (computing + bare)
    together = rings.readings(bodies(TOGETHER, tokens))
    took_s = max(one.pieces[-1][0] for one in together) - min(one.pieces[0][0] for one in together)
    rate = sum(count for one in together for _, count in one.pieces) / took_s
    return [
        figure(f"{name}/token", round(middle, 1), "ms/token",
               compared_with=f"range {min(times):.1f} to {max(times):.1f}"),
        figure(f"{name}/computing", round(computing, 1), "ms/token",
               compared_with=f"in the stages' steps; over and over, when they were loaded, {loaded:.1f}"),
        figure(f"{name}/beside_it", round(middle - computing - bare, 1), "ms/token",
               compared_with="all but computing and crossings: four times through processes, TLS and loops"),
        figure(f"{name}/share", round(share, 3), "", f"at most {RING_GOAL}", share <= RING_GOAL,
               f"{computing:.1f} ms of computing and {bare:g} ms of crossings"),
        figure(f"{name}/first_token", round(statistics.median(firsts), 1), "ms"),
        figure(f"{name}/{TOGETHER}_streams", round(rate, 1), "tokens/s", compared_with=f"one: {1000 / middle:.1f}"),
    ]  # fmt: skip


def beside_a_stage(rings: Rings, one_way_ms: float, tokens: int, streams: int) -> list[dict[str, object]]:
    times = [rings.readings([body])[0].token_ms for body in bodies(streams, tokens)]
    ways = 3 if "node0" in (rings.working[0], rings.working[-1]) else 4
    said = f"{rings.computing_ms[0]:.1f} ms of computing and {ways} crossings of {one_way_ms:g} ms"
    return [figure(f"ring/{one_way_ms:g}ms/beside_stage", round(statistics.median(times), 1), "ms/token",
                   compared_with=said)]  # fmt: skip


def on_a_text_that_repeats(rings: Rings, model: Path, one_way_ms: float) -> dict[str, object]:
    body, bare = {**bodies(1, 96)[0], "prompt": "a b c d " * 8}, 4 * one_way_ms
    rings.serve_model(model)
    rings.until(1)
    guessed = [rings.readings([body])[0] for _ in range(3)]
    rings.serve("--no-guess")
    rings.until(1)
    (plain,) = rings.readings([body])
    if any(one.text != plain.text for one in guessed):
        sys.exit("Guesses changed what was said.")
    middle = statistics.median(one.token_ms for one in guessed)
    return figure(f"ring/{one_way_ms:g}ms/repeating_text", round(middle, 1), "ms/token", f"less than {bare:g}",
                  middle < bare, f"prompt look-up; without guesses {plain.token_ms:.1f}")  # fmt: skip


def losses(given: argparse.Namespace) -> list[dict[str, object]]:
    trials, streams = (2, 2) if given.quick else (25, 4)
    dice = random.Random(7)
    figures: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        memory = ring_model(folder / "model", 0.05)
        with Rings(folder / "shoal", folder / "model", one_way_ms=40.0, nodes=4, memory_bytes=memory) as rings:
            rings.serve("--no-guess")
            rings.until(1, 3)
            asked = bodies(streams, 20)
            undisturbed = [reading.text for reading in rings.readings(asked)]
            for how, goal_s in (("killed", KILLED_GOAL_S), ("silent", SILENT_GOAL_S)):
                gaps, exact = [], 0
                for trial in range(trials):
                    rings.until(1, 3)
                    readings, doomed = disturbed(rings, asked, how, dice)
                    gaps += [one.gap_s for one in readings]
                    exact += sum(one.text == said for one, said in zip(readings, undisturbed, strict=True))
                    print(f"{how} {trial + 1}/{trials}: {doomed}, gap {max(one.gap_s for one in readings):.2f} s, "
                          f"{exact} exact", file=sys.stderr)  # fmt: skip
                total, worst = trials * streams, max(gaps)
                figures += [
                    figure(f"loss/{how}/gap_worst", round(worst, 2), "s", f"at most {goal_s:g}", worst <= goal_s,
                           f"{trials} losses, {streams} streams each; median {statistics.median(gaps):.2f} s"),
                    figure(f"loss/{how}/exact", exact, "streams", f"{total} of {total}", exact == total,
                           "the same requests undisturbed"),
                ]  # fmt: skip
    return figures


def disturbed(rings: Rings, asked: list[dict[str, object]], how: str, dice: random.Random) -> tuple[list[Reading], str]:
    """Streams of which a stage is lost at a random token; gives also what was lost. The node is back afterwards."""
    doomed, after = dice.choice(rings.working), dice.randrange(1, 18)
    done, readings = False, list[Reading]()
    for readings in rings.read(asked):
        if not done and len(readings[0].pieces) >= after:
            done = True
            rings.kill(doomed) if how == "killed" else rings.cut(doomed)
    rings.start_node(doomed) if how == "killed" else rings.cut(doomed)
    return readings, f"{doomed} after {after} tokens"
