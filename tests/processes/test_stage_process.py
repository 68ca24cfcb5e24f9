"""A stage in a child process: prompts and streams through a ring of two, and what a ring must survive."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stages import SMALL, a_checkpoint
from transformers import AutoModelForCausalLM

from shoal.engines import EngineDied, EngineFailed
from shoal.inference.commands import Advance, LoadStage
from shoal.inference.process import StageProcess
from shoal.models.configs import read_config
from shoal.protocol.serving import PIECE_MAX, Choosing

GENEROUS_S = 120.0


async def a_ring(folder: Path, cuts: tuple[int, ...] = (1,), memory: int = 1 << 28) -> list[StageProcess]:
    ends = [0, *cuts, SMALL["num_hidden_layers"]]
    ring = [await StageProcess.start(f"stage {first}") for first in ends[:-1]]
    for stage, first, stop in zip(ring, ends, ends[1:], strict=False):
        files = tuple(str(file) for file in sorted(folder.glob("*.safetensors")))
        loaded = await stage.load(
            LoadStage(config=read_config(folder), files=files, first=first, stop=stop, memory_bytes=memory)
        )
        assert loaded.arithmetic and loaded.layer_ms > 0 and loaded.weights_bytes > 0
        assert (loaded.last_ms > 0) == (stop == ends[-1])
    return ring


async def through(ring: list[StageProcess], session: int, start: int, tokens: list[int], **more: Any) -> list[int]:
    """The tokens chosen after the last `choose` of these."""
    states = b""
    for stage in ring:
        done = await stage.advance(
            Advance(session=session, start=start, tokens=tuple(tokens), states=states, **({"choose": 1} | more))
        )
        states = done.states
    return [one.token for one in done.chosen]


async def stream(
    ring: list[StageProcess], session: int, prompt: list[int], count: int, sampling: Choosing
) -> list[int]:
    for at in range(0, len(prompt) - 1, 16):
        piece = prompt[at : min(at + 16, len(prompt) - 1)]
        await through(ring, session, at, piece, choose=0)
    done = list(prompt)
    for _ in range(count):
        done += await through(ring, session, len(done) - 1, done[-1:], sampling=sampling)
    return done[len(prompt) :]


GREEDY = Choosing(temperature=0)


def test_streams_together_say_what_each_says_alone(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    dice = torch.Generator().manual_seed(8)
    prompts = [torch.randint(1, 96, (5 + 7 * number,), generator=dice).tolist() for number in range(6)]
    with torch.no_grad():
        expected = [
            model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
            for prompt in prompts
        ]

    async def life() -> None:
        ring = await a_ring(folder)
        try:
            together = await asyncio.gather(
                *(stream(ring, number, prompt, 12, GREEDY) for number, prompt in enumerate(prompts))
            )
            assert together == expected
            seeded = Choosing(temperature=1.0, seed=5, presence_penalty=0.5, prompt_tokens=len(prompts[2]))
            alone = await stream(ring, 20, prompts[2], 12, seeded)
            beside, *_ = await asyncio.gather(
                stream(ring, 21, prompts[2], 12, seeded),
                *(stream(ring, 30 + number, prompt, 12, GREEDY) for number, prompt in enumerate(prompts)),
            )
            assert beside == alone != expected[2]
            # Replayed at once, after a loss: the next token is the one that would have come.
            whole = prompts[2] + alone
            await through(ring, 40, 0, whole[:-2], choose=0)
            assert await through(ring, 40, len(whole) - 2, whole[-2:-1], sampling=seeded) == whole[-1:]
            # Guesses are checked several at a time.
            assert await through(ring, 41, 0, whole[:-1], choose=4, sampling=seeded) == whole[-4:]
        finally:
            for stage in ring:
                await stage.stop()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


def test_more_than_an_engine_is_asked_at_once_waits_its_turn(tmp_path: Path) -> None:
    """However many sessions come and go at the same moment: one that could not be closed would keep its memory."""

    async def life() -> None:
        (stage,) = await a_ring(a_checkpoint(tmp_path, "llama"), cuts=())
        try:
            said = await asyncio.gather(
                *(through([stage], session, 0, [7, 8, 9], sampling=GREEDY) for session in range(200))
            )
            assert len(said) == 200 and all(one == said[0] for one in said)
            await asyncio.gather(*(stage.close_session(session) for session in range(200)))
        finally:
            await stage.stop()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


def test_what_does_not_fit_is_refused_and_nobody_else_is_held_up(tmp_path: Path) -> None:
    zeros, biased = bytes(256), Choosing(logit_bias=((96, 1.0),))

    def masked(count: int) -> Choosing:
        return Choosing(masks=(b"no mask",) * count)

    async def life() -> None:
        stage = await StageProcess.start("a stage")
        with pytest.raises(EngineFailed, match="before it was loaded"):
            await stage.advance(Advance(session=1, start=0, tokens=(1,)))
        await stage.kill()
        first, last = ring = await a_ring(a_checkpoint(tmp_path, "llama"), memory=1 << 20)
        try:
            with pytest.raises(EngineFailed, match="loaded already"):
                await first.load(LoadStage(config="{}", files=("x",), first=0, stop=1, memory_bytes=0))
            good = asyncio.create_task(through(ring, 1, 0, [1, 2, 3]))
            bad = await asyncio.gather(
                first.advance(Advance(session=2, start=5, tokens=(1,))),
                first.advance(Advance(session=3, start=0, tokens=(96,))),
                last.advance(Advance(session=4, start=0, tokens=(1,), states=b"abc")),
                last.advance(Advance(session=5, start=0, tokens=(1,), states=b"\xff" * 256)),
                last.advance(Advance(session=6, start=0, tokens=(1,), states=zeros, choose=2)),
                last.advance(Advance(session=7, start=0, tokens=(1,), states=zeros, choose=1, sampling=masked(2))),
                last.advance(Advance(session=8, start=0, tokens=(1,), states=zeros, choose=1, sampling=masked(1))),
                last.advance(Advance(session=9, start=0, tokens=(1,), states=zeros, choose=1, sampling=biased)),
                return_exceptions=True,
            )
            sentences = [str(one) for one in bad if isinstance(one, EngineFailed)]
            parts = (
                "cannot go on", "vocabulary", "3 bytes", "not finite", "2 tokens are wanted after 1 positions",
                "1 tokens are wanted, and 2 masks came", "not whole", "no token 96 of which a bias speaks",
            )  # fmt: skip
            for sentence, part in zip(sentences, parts, strict=True):
                assert part in sentence
            assert len(await good) == 1
            with pytest.raises(EngineFailed, match="are needed for sessions"):
                for session in range(100, 200):
                    await first.advance(Advance(session=session, start=0, tokens=(1,) * PIECE_MAX))
            for session in range(100, 200):
                await first.close_session(session)
            await first.advance(Advance(session=300, start=0, tokens=(1,) * PIECE_MAX))
            os.kill(last.pid, signal.SIGKILL)
            with pytest.raises(EngineDied, match=r"was killed \(SIGKILL\)"):
                await through(ring, 1, 3, [4])
        finally:
            await first.stop()
            await last.kill()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))
