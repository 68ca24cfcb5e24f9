"""Serving, measured.

    python benchmarks/serving.py [--only PARTS] [--quick] [--repetitions N] [--size NAME] [--save NAME]

**one**: one node with the whole model beside plain `transformers`. `transformers` generates greedily with its own
key-value cache; the stage runtime takes the same prompts through the same checkpoint, in the mode in which a token's
bits do not depend on the batch. Both use the same threads, and both say the same tokens, or the run ends. One stream:
tokens per second after the prompt. Many streams: all of them in every step, against the same streams one after another.

**split**: three unequal stages on this machine, split by the planner, equally, and in proportion to memory.

**rings** and **losses**: over distance (`distance.py`); they need root, for network namespaces.

**start**: from the start of `shoal serve` to the first token, on a node that has the model's files already.

Prints tables, and last one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from distance import losses, over_distance
from links import CannotMeasure
from results_form import chosen, figure, report, show
from rings import SHOAL
from serving_model import SIZES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shoal.gateway.rings import LocalRing
from shoal.inference.commands import Advance, LoadStage
from shoal.inference.process import StageProcess
from shoal.inference.stage import Piece, StageEngine
from shoal.models.configs import read_config
from shoal.protocol.serving import Choosing
from shoal.sharding import GATEWAY, Links, ModelNeeds, ServingNode, plan

ALONE_GOAL, MANY_GOAL = 0.97, 4.0
STREAMS = 16
MEMORY = 4 << 30


def checkpoint(folder: Path, size: str) -> Any:
    """A model of random weights, large enough that it does not say the same all the time."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama", max_position_embeddings=2048, initializer_range=0.05, eos_token_id=None, pad_token_id=0, **SIZES[size]
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


class Timed:
    """Tokens, and the seconds that those after the first took."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []

    def put(self, token: Any) -> None:
        """As a streamer of `transformers`: it gives the prompt first."""
        self.times.append(time.perf_counter())
        self.tokens += token.reshape(-1).tolist()

    def end(self) -> None:
        pass

    @property
    def seconds_per_token(self) -> float:
        return (self.times[-1] - self.times[-len(self.times) + 1]) / (len(self.times) - 2)


def plain(model: Any, prompt: torch.Tensor, count: int) -> tuple[list[int], float]:
    timed = Timed()
    with torch.inference_mode():
        model.generate(prompt[None], max_new_tokens=count, do_sample=False, streamer=timed)
    return timed.tokens[len(prompt) :], timed.seconds_per_token


def stage(engine: StageEngine, prompt: torch.Tensor, count: int) -> tuple[list[int], float]:
    timed = Timed()
    timed.put(prompt)
    (states,) = engine.step([Piece(1, 0, prompt)])
    for at in range(len(prompt), len(prompt) + count):
        token = engine.logits(states[-1:]).argmax(-1)
        timed.put(token)
        if at + 1 < len(prompt) + count:
            (states,) = engine.step([Piece(1, at, token)])
    engine.close(1)
    return timed.tokens[len(prompt) :], timed.seconds_per_token


def stages(engine: StageEngine, prompts: Sequence[torch.Tensor], count: int) -> float:
    """Tokens per second of all streams, in steps of all of them."""
    first = engine.step([Piece(number, 0, prompt) for number, prompt in enumerate(prompts)])
    tokens = engine.logits(torch.cat([states[-1:] for states in first])).argmax(-1)
    began = time.perf_counter()
    for step in range(count):
        pieces = [
            Piece(number, len(prompt) + step, tokens[number : number + 1]) for number, prompt in enumerate(prompts)
        ]
        tokens = engine.logits(torch.cat(engine.step(pieces))).argmax(-1)
    passed = time.perf_counter() - began
    for number in range(len(prompts)):
        engine.close(number)
    return count * len(prompts) / passed


def one(given: argparse.Namespace) -> list[dict[str, object]]:
    repetitions, count = (2, 16) if given.quick else (given.repetitions, 128)
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(Path(folder), given.size)
        files = sorted(Path(folder).glob("*.safetensors"))
        layers = SIZES[given.size]["num_hidden_layers"]
        engine = StageEngine.read(read_config(Path(folder)), files, 0, layers, MEMORY)
    dice = torch.Generator().manual_seed(2)
    prompts = [torch.randint(1, SIZES[given.size]["vocab_size"], (64,), generator=dice) for _ in range(STREAMS)]

    rows = []
    for number in range(repetitions):
        prompt = prompts[number % STREAMS]
        theirs, their_s = plain(model, prompt, count)
        ours, our_s = stage(engine, prompt, count)
        if theirs != ours:
            sys.exit(f"The tokens differ: {theirs[:8]}... of transformers, {ours[:8]}... here.")
        rows.append((1 / their_s, 1 / our_s, stages(engine, prompts, count // 2)))
        print(f"{number + 1}/{repetitions}: transformers {rows[-1][0]:.1f}, here {rows[-1][1]:.1f} tokens/s; "
              f"{STREAMS} streams {rows[-1][2]:.1f} tokens/s", file=sys.stderr)  # fmt: skip
    their, our, many = (statistics.median(column) for column in zip(*rows, strict=True))
    alone = [ours / theirs for theirs, ours, _ in rows]
    times = [together / ours for _, ours, together in rows]

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, prompts of 64 tokens")
    print(f"{'transformers, one stream':32}{their:10.1f} tokens/s")
    print(f"{'stage, one stream':32}{our:10.1f} tokens/s  {statistics.median(alone):.3f} of it "
          f"({min(alone):.3f} to {max(alone):.3f})")  # fmt: skip
    print(f"{f'stage, {STREAMS} streams':32}{many:10.1f} tokens/s  {statistics.median(times):.2f} times one stream "
          f"({min(times):.2f} to {max(times):.2f})")  # fmt: skip
    print(f"{'same bits whatever the batch':32}{'yes' if engine.exact else 'no':>10}")

    share, factor = statistics.median(alone), statistics.median(times)
    same = "transformers generate, greedy, with its cache, in the same repetition"
    return [
        figure("parameters", parameters, "parameters"),
        figure("one/transformers", round(their, 1), "tokens/s"),
        figure("one/stage", round(our, 1), "tokens/s", compared_with=same),
        figure("one/share", round(share, 3), "", f"at least {ALONE_GOAL}", share >= ALONE_GOAL,
               f"{same}; range {min(alone):.3f} to {max(alone):.3f}"),
        figure(f"{STREAMS}/stage", round(many, 1), "tokens/s"),
        figure(f"{STREAMS}/times_one", round(factor, 2), "x", f"at least {MANY_GOAL:g}", factor >= MANY_GOAL,
               f"one stream after another, same repetition; range {min(times):.2f} to {max(times):.2f}"),
        figure("exact", int(engine.exact), "", "1", engine.exact, "bits alone, at once and beside others"),
    ]  # fmt: skip


# --- stages of unequal speed -----------------------------------------------------------------------------------------

SPEEDS, ROOM = (1.0, 0.5, 0.25), (5, 4, 3)
"""Of three stages on this machine: the share of the time in which each may compute, and layers that fit."""


async def _token_ms(folder: Path, counts: Sequence[int], tokens: int) -> tuple[float, list[float]]:
    """Milliseconds a token of one stream through stages with so many layers, and what each measured for a layer."""
    config, files = read_config(folder), tuple(map(str, sorted(folder.glob("*.safetensors"))))
    processes, layers_ms, first = [], [], 0
    try:
        for speed, count in zip(SPEEDS, counts, strict=True):
            process = await StageProcess.start("a stage")
            processes.append(process)
            loaded = await process.load(
                LoadStage(config=config, files=files, first=first, stop=first + count, memory_bytes=MEMORY // 4,
                          speed_limit=speed)
            )  # fmt: skip
            layers_ms.append(loaded.layer_ms)
            first += count
        ring = LocalRing("stages", processes, arithmetic="", token_ms=1.0)
        token, times = 1, []
        for at in range(tokens):
            began = time.perf_counter()
            piece = Advance(session=1, start=at, tokens=(token,), choose=1, sampling=Choosing(temperature=0))
            (chosen,) = (await ring.advance(piece)).chosen
            times.append((time.perf_counter() - began) * 1000)
            token = chosen.token
        return statistics.median(times), layers_ms
    finally:
        for process in processes:
            await process.stop()


def split(given: argparse.Namespace) -> list[dict[str, object]]:
    tokens = 12 if given.quick else 60
    layers = SIZES[given.size]["num_hidden_layers"]
    rooms = [room * layers // 8 for room in ROOM]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint(folder, given.size)
        equal = [layers // 3 + (at < layers % 3) for at in range(3)]
        _, layers_ms = asyncio.run(_token_ms(folder, equal, 4))
        nodes = [ServingNode(bytes([at]), f"stage {at}", room, ms) for at, (room, ms) in
                 enumerate(zip(rooms, layers_ms, strict=True))]  # fmt: skip
        ends = [GATEWAY, *(node.node for node in nodes)]
        links = Links(dict.fromkeys(itertools.combinations(ends, 2), 0.1))
        wanted = plan(ModelNeeds(layers=layers, layer_bytes=1, cache_bytes=0), nodes, links)
        planned = {stage.node: stage.layers for stage in wanted.replicas[0].stages}
        shares = [layers * room / sum(rooms) for room in rooms]
        by_memory = [int(share) for share in shares]
        for at in sorted(range(3), key=lambda at: by_memory[at] - shares[at])[: layers - sum(by_memory)]:
            by_memory[at] += 1
        ways = {"planned": [planned.get(node.node, 0) for node in nodes], "equal": equal, "by memory": by_memory}
        if min(ways["planned"]) < 1:  # a stage that is not needed is left out; here all three take part
            ways["planned"] = [count or 1 for count in ways["planned"]]
            ways["planned"][0] -= sum(ways["planned"]) - layers
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(1 if given.quick else 3):
            for way, counts in ways.items():
                found[way].append(asyncio.run(_token_ms(folder, counts, tokens))[0])
    print(f"three stages of speeds {SPEEDS} with room for {rooms} of {layers} layers")
    figures = []
    for way, counts in ways.items():
        ms = statistics.median(found[way])
        print(f"{way:12}{counts!s:14}{ms:8.1f} ms a token")
        figures.append(figure(f"split/{way.replace(' ', '_')}", round(ms, 1), "ms/token", compared_with=str(counts)))
    return figures


# --- from the command to the first token -----------------------------------------------------------------------------

START_GOAL_S = 5.0


def start(given: argparse.Namespace) -> list[dict[str, object]]:
    times = []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        shape = {**SIZES["25M"], "vocab_size": 257}
        torch.manual_seed(1)
        config = AutoConfig.for_model("llama", max_position_embeddings=2048, eos_token_id=None, pad_token_id=0, **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        home = {**os.environ, "SHOAL_HOME": str(folder / "home")}
        up = subprocess.Popen([*SHOAL, "up", "--nodes", "1", "--json"], env=home, stdout=subprocess.PIPE)
        try:
            assert up.stdout is not None
            up.stdout.readline()
            for number in range(1 + (2 if given.quick else 5)):
                began = time.perf_counter()
                serve = subprocess.Popen(
                    [*SHOAL, "serve", str(folder / "model"), "--name", "m", "--http", "127.0.0.1:0", "--json"],
                    env=home, stdout=subprocess.PIPE,
                )  # fmt: skip
                try:
                    assert serve.stdout is not None
                    url = json.loads(serve.stdout.readline())["url"]
                    while True:
                        body = {"model": "m", "prompt": "def f(x):", "max_tokens": 1}
                        answer = httpx.post(f"{url}/completions", json=body, timeout=60)
                        if answer.status_code == 200:
                            break
                        time.sleep(0.01)
                    if number:  # the first one brings the files to the node
                        times.append(time.perf_counter() - began)
                        print(f"start {number}: {times[-1]:.2f} s", file=sys.stderr)
                finally:
                    serve.send_signal(signal.SIGINT)
                    serve.wait(30)
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(30)
    middle = statistics.median(times)
    return [
        figure("start/first_token", round(middle, 2), "s", f"under {START_GOAL_S:g}", middle < START_GOAL_S,
               f"{size / 1e6:.0f} MB in float32, on the node already; range {min(times):.2f} to {max(times):.2f}")
    ]  # fmt: skip


PARTS = {"one": one, "split": split, "rings": over_distance, "losses": losses, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PARTS", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--quick", action="store_true", help="a short form; shows that it works, proves little")
    parser.add_argument("--repetitions", type=int, default=7, help="of `one`")
    parser.add_argument("--size", choices=SIZES, default="25M", help="of the model in `one` and `split`")
    parser.add_argument("--save", metavar="NAME", help="keep the result under benchmarks/results/")
    given = parser.parse_args()
    parts = chosen(given.only, PARTS, parser)
    disable_progress_bar()
    figures: list[dict[str, object]] = []
    try:
        for part in parts:
            found = PARTS[part](given)
            show(found)
            figures += found
    except CannotMeasure as error:
        sys.exit(str(error))
    report(figures, save_as=given.save)


if __name__ == "__main__":
    main()
