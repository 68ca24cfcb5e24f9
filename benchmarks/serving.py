"""Serving, measured: one node with the whole model, beside plain `transformers`, side by side in one run.

    python benchmarks/serving.py [--quick] [--repetitions N] [--size NAME] [--save NAME]

`transformers` generates greedily with its own key-value cache; the stage runtime takes the same prompts through the
same checkpoint, in the mode in which a token's bits do not depend on the batch. Both use the same threads, and both say
the same tokens, or the run ends. One stream: tokens per second after the prompt. Many streams: all of them in every
step, against the same streams one after another. Prints a table, and last one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results_form import figure, report
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shoal.inference.stage import Piece, StageEngine
from shoal.models.configs import read_config

SIZES: dict[str, dict[str, int]] = {
    "1M": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 4, "vocab_size": 257},
    "25M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 4096},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 4, "vocab_size": 16000},
}  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form; shows that it works, proves little")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, default="25M")
    parser.add_argument("--save", metavar="NAME", help="keep the result under benchmarks/results/")
    given = parser.parse_args()
    repetitions, count = (2, 16) if given.quick else (given.repetitions, 128)
    disable_progress_bar()

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
    report(
        [
            figure("parameters", parameters, "parameters"),
            figure("one/transformers", round(their, 1), "tokens/s"),
            figure("one/stage", round(our, 1), "tokens/s", compared_with=same),
            figure("one/share", round(share, 3), "", f"at least {ALONE_GOAL}", share >= ALONE_GOAL,
                   f"{same}; range {min(alone):.3f} to {max(alone):.3f}"),
            figure(f"{STREAMS}/stage", round(many, 1), "tokens/s"),
            figure(f"{STREAMS}/times_one", round(factor, 2), "x", f"at least {MANY_GOAL:g}", factor >= MANY_GOAL,
                   f"one stream after another, same repetition; range {min(times):.2f} to {max(times):.2f}"),
            figure("exact", int(engine.exact), "", "1", engine.exact, "bits alone, at once and beside others"),
        ],
        save_as=given.save,
    )  # fmt: skip


if __name__ == "__main__":
    main()
