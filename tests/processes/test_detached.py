"""Jobs that nodes drive while their owner is away: real processes, hosts that are killed, and money that adds up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from job_world import PATIENCE_S, Watch, check_account, job_text, options_for, owner_key, parsed

from shoal.driver.folder import RunFolder
from shoal.protocol.training import Term
from shoal.sdk.attached import AttachOptions, attach
from shoal.sdk.detached import Standing, detach, handed
from shoal.sdk.local import LocalProcess, LocalShoal


async def three_nodes(shoal: LocalShoal, **options: list[str]) -> None:
    await shoal.start_hub()
    await asyncio.gather(
        *(
            shoal.start_node(name, options=["--threads", "1", "--storage", "1 GiB", *options.get(name, [])])
            for name in ("amber", "birch", "cedar")
        )
    )


def attach_options(at: Path, watch: Watch) -> AttachOptions:
    return AttachOptions(at / "run", say=watch.said.append, progress=watch.progress, event=watch.event)


@pytest.mark.timeout(400)
def test_a_node_drives_and_the_owner_gets_it_all(tmp_path: Path) -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await three_nodes(shoal)
            text, seen = job_text(tmp_path), list[list[Standing]]()
            options = options_for(shoal, tmp_path / "run", owner_key(), Watch())
            made = await detach(parsed(text, tmp_path), text, options, lambda one: seen.append(list(one)))
            assert len(made.hosts) == 2 and {one.phase for one in seen[-1]} == {"driving", "standing by"}
            watch = Watch()
            async with asyncio.timeout(PATIENCE_S):
                report = await attach(attach_options(tmp_path, watch))
            assert report is not None and report.tokens_accepted >= 40_000
            check_account(report, tmp_path / "run")
            assert (tmp_path / "run" / "model" / "model.safetensors").is_file() and watch.shares[-1] >= 1

    asyncio.run(whole())
