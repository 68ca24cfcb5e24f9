"""Replicas on unlike processors: a stream goes on where its bits are the same, and says so when they are not."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from test_gateway import GENEROUS_S, PROMPT, checkpoint, expected

from shoal.gateway.openai import CameBy
from shoal.gateway.rings import LocalRing, arithmetic_of
from shoal.gateway.service import Asked
from shoal.models.tokenizers import ByteTokenizer
from shoal.protocol.serving import Choosing
from shoal.sdk.serve import LocalServer, ServeOptions
from shoal.world import SystemClock, SystemDice

__all__ = ["checkpoint"]


def test_a_ring_has_the_arithmetic_of_its_stages() -> None:
    assert arithmetic_of([(4, 8, "x"), (0, 4, "x")]) == "x" == arithmetic_of([(0, 8, "x")])
    mixed = arithmetic_of([(0, 3, "x"), (3, 5, "x"), (5, 8, "y")])
    assert mixed == "layers 0 to 4: x; layers 5 to 7: y" == arithmetic_of([(5, 8, "y"), (0, 5, "x")])
    assert arithmetic_of([(0, 5, "y"), (5, 8, "x")]) != mixed != arithmetic_of([(0, 4, "x"), (4, 8, "y")])
    assert arithmetic_of([(0, 4, "x"), (4, 8, "")]) == ""


def test_a_stream_stays_with_its_arithmetic_while_it_can(checkpoint: Path) -> None:
    """Three replicas in real processes; what one of them computes with is made up."""

    async def scene() -> None:
        servers = [LocalServer(ServeOptions(checkpoint, "small"), SystemClock(), SystemDice()) for _ in range(3)]
        replicas = []
        for server in servers:
            await server.start()
            assert server.service is not None
            replicas += server.service.rings
        unlike, first, like = replicas
        assert isinstance(first, LocalRing) and isinstance(like, LocalRing)
        assert first.arithmetic and first.arithmetic == unlike.arithmetic == like.arithmetic
        first.name, unlike.name, like.name = "first", "unlike", "like"
        unlike.arithmetic = "another processor"
        first.token_ms, unlike.token_ms, like.token_ms = 1.0, 2.0, 3.0
        like.standby = True
        service = servers[0].service
        assert service is not None
        service.rings[:] = replicas
        service.ends = frozenset()
        asked = Asked((tuple(ByteTokenizer().encode(PROMPT).tolist()),), 1, Choosing(temperature=0.0), 40, ())

        async def said(doomed: LocalRing) -> CameBy:
            """How a stream came about in which, after ten tokens, this one was killed."""
            killed, count, text = False, 0, ""
            async for piece in service.answer(asked):
                text, count = text + piece.text, count + len(piece.tokens)
                if count >= 10 and not killed:
                    os.kill(doomed._stages[0].pid, signal.SIGKILL)
                    killed = True
            assert text == expected(checkpoint, PROMPT, 40) and piece.came_by is not None
            return piece.came_by

        assert await said(first) == CameBy(True, ("first", "like"), 1), "what is in reserve has the same bits"
        service.rings[:], like.standby, like.token_ms = [like, unlike], False, 1.0
        assert await said(like) == CameBy(False, ("like", "unlike"), 1)
        for server in servers:
            await server.stop()

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))
