"""From messages to text: by the model's own chat template, or a plain one where it has none. A template runs in a
process of its own (`template_worker`): whatever it does, the request is refused and the endpoint goes on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from shoal.engines import ChildEngine, Done, EngineDied, EngineFailed
from shoal.gateway.openai import ChatMessage
from shoal.gateway.refusals import Overloaded, RequestRefused
from shoal.gateway.template_commands import (
    TEMPLATE_MAX_BYTES,
    Answered,
    LoadTemplate,
    Rendered,
    RenderTemplate,
    TemplateMessage,
)
from shoal.models.configs import BadModel
from shoal.models.tokenizers import special_token

RENDER_S = 5.0
"""A template that takes longer for a request is stopped; an honest one takes milliseconds."""
TURN_S = 10.0
"""A request that waits longer behind others comes again later. At most as many wait as there are connections."""
START_S = 30.0
"""For the process and for reading the template, which has a bound of its own (`template_worker.CPU_MAX_S`)."""
TRIES = 2
"""A process that is gone may have been killed by others: its request gets another one, once."""
ENVIRONMENT = ("HOME", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "TZ")
"""What the process is told of the gateway's own: where Python and its packages are, and the zone of its clock."""
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class TemplateProcess(ChildEngine):
    """One child process with one template in it."""

    ANSWERED: ClassVar[type] = Answered
    WORKER: ClassVar[str] = "shoal.gateway.template_worker"

    async def load(self, command: LoadTemplate) -> None:
        await self._ask(command, Done)

    async def render(self, command: RenderTemplate) -> str:
        return (await self._ask(command, Rendered)).text


class ChatTemplate:
    """A checkpoint's template, with the process in which it runs, from `begin` to `stop`. One request at a time: first
    come, first served. A process that died or had to be killed is followed by another one at the next request."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        self._load = LoadTemplate(source=source, special=special)
        self._process: TemplateProcess | None = None
        self._turn = asyncio.Lock()
        self._rendering: asyncio.Task[str] | None = None
        self._stopped = False

    async def begin(self) -> None:
        """Start the process ahead of `start`, so that it loads its libraries meanwhile. Raises EngineDied."""
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        try:
            self._process = await TemplateProcess.spawn("the chat template", environment)
        except OSError as error:
            raise EngineDied(f"The process of the chat template could not be started: {error.strerror}.") from error

    async def start(self) -> None:
        """Have the template read. Raises BadModel and EngineDied."""
        if self._process is None:
            await self.begin()
        assert self._process is not None
        try:
            async with asyncio.timeout(START_S):
                await self._process.load(self._load)
        except TimeoutError as error:
            await self._end()
            raise BadModel(f"The model's chat template cannot be read within {START_S:.0f} s.") from error
        except (EngineFailed, EngineDied) as error:
            await self._end()
            raise BadModel(f"The model's chat template cannot be read: {error.sentence}") from error

    async def render(self, messages: Sequence[ChatMessage], now_ms: int = 0) -> str:
        """The prompt, at a time since 1970. Raises RequestRefused: a template may refuse an order of roles, for one;
        Overloaded; EngineDied.

        Who does not wait for it any more leaves the queue. What is being rendered is rendered to its end, so that the
        process is free, or killed, when the next one's turn comes."""
        try:
            async with asyncio.timeout(TURN_S):
                await self._turn.acquire()
        except TimeoutError as error:
            raise Overloaded(
                "The model's chat template is busy with other requests; try again later.", TURN_S
            ) from error
        command = RenderTemplate(
            messages=[TemplateMessage(message.role, message.text) for message in messages], now_ms=now_ms
        )
        self._rendering = asyncio.create_task(self._rendered(command))
        self._rendering.add_done_callback(self._over)
        return await asyncio.shield(self._rendering)

    async def stop(self) -> None:
        """Twice, or before the start, is harmless."""
        self._stopped = True
        await self._end()
        async with self._turn:  # a process that was on its way
            await self._end()

    async def _rendered(self, command: RenderTemplate) -> str:
        died: EngineDied | None = None
        for _ in range(TRIES):
            process = await self._ready()
            try:
                async with asyncio.timeout(RENDER_S):
                    return await process.render(command)
            except EngineFailed as error:
                raise _refused(f"refuses these messages: {error.sentence}") from error
            except TimeoutError as error:
                await self._end()
                raise _refused(f"takes longer than {RENDER_S:.0f} s for these messages and was stopped.") from error
            except EngineDied as error:
                await self._end()
                died = error
        raise _refused(f"breaks off at these messages: {died}") from died

    def _over(self, rendering: asyncio.Task[str]) -> None:
        self._turn.release()
        if not rendering.cancelled():
            rendering.exception()  # nobody may wait for it any more

    async def _ready(self) -> TemplateProcess:
        if self._stopped:
            raise EngineDied("The endpoint is stopping.")
        if self._process is None:
            try:
                await self.start()
            except BadModel as error:
                raise RequestRefused(error.sentence, param="messages") from error
        assert self._process is not None
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.kill()


def _refused(what: str) -> RequestRefused:
    return RequestRefused(f"The model's chat template {what}", param="messages")


def read_template(directory: Path) -> ChatTemplate:
    """`chat_template.jinja`, what `tokenizer_config.json` has, or a plain one. Raises BadModel."""
    settings = _settings(directory / "tokenizer_config.json")
    named = {name: special_token(settings, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {name: token for name, token in named.items() if token is not None}
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}.get("default")
    file = directory / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > TEMPLATE_MAX_BYTES:
            raise BadModel(f"{file} is larger than {TEMPLATE_MAX_BYTES} bytes.")
        source = file.read_text(encoding="utf-8", errors="replace")
    if not isinstance(source, str):
        source = PLAIN
    if len(source.encode()) > TEMPLATE_MAX_BYTES:
        raise BadModel(f"The chat template in {directory} is larger than {TEMPLATE_MAX_BYTES} bytes.")
    return ChatTemplate(source, special)


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(file.read_bytes())
    except OSError:
        return {}
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadModel(f"{file} is not JSON: {error}.") from error
    return found if isinstance(found, dict) else {}
