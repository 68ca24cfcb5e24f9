"""The process in which a model's chat template runs: `python -m shoal.gateway.template_worker PARENT_PID`.

A template comes with the model, from whoever made that. The sandbox keeps it from files and attributes, and does not
keep it from computing without end: so it has this process, which is bounded and may be killed. What a template finds
here is what `transformers` would give it.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.sandbox
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from shoal.engines import SENTENCE_MAX, Done, EngineFailed, Failed, Stop, worker
from shoal.gateway.template_commands import (
    PROMPT_MAX_BYTES,
    Asked,
    Command,
    LoadTemplate,
    Rendered,
    RenderTemplate,
    Reply,
)

MEMORY_MAX_BYTES = 512 << 20
"""Of addresses, the interpreter's included (Linux). The largest honest prompt takes a tenth of it."""
CPU_MAX_S = 6
"""Of processor time for a command, and at most a second more: an end also where the gateway is gone."""
GIVEN = {"tools": None, "documents": None, "add_generation_prompt": True}
"""Templates ask whether the first two are none, which what is not there would not be."""


class Worker:
    def __init__(self, pipe: worker.Pipe) -> None:
        self._pipe = pipe
        self._template: jinja2.Template | None = None
        self._special: dict[str, str] = {}

    async def run(self) -> None:
        """Until Stop or the end of stdin."""
        while (asked := await self._pipe.next()) is not None:
            if isinstance(asked.command, Stop):
                return await self._pipe.send(asked.number, Done())
            _limit(resource.RLIMIT_CPU, math.ceil(_used_s()) + CPU_MAX_S)
            await self._pipe.send(asked.number, self._done(asked.command))
        return None

    def _done(self, command: Command) -> Reply:
        try:
            if isinstance(command, LoadTemplate):
                self._template, self._special = _environment().from_string(command.source), command.special
                return Done()
            assert isinstance(command, RenderTemplate) and self._template is not None
            return Rendered(text=self._prompt(self._template, command))
        except MemoryError:
            return _failed(f"it takes more than {MEMORY_MAX_BYTES >> 20} MiB of memory")
        except Exception as error:  # noqa: BLE001 - a template may fail with anything
            return _failed(str(error) or type(error).__name__)

    def _prompt(self, template: jinja2.Template, command: RenderTemplate) -> str:
        messages = [msgspec.structs.asdict(message) for message in command.messages]
        parts, length = [], 0
        now = datetime.fromtimestamp(command.now_ms / 1000)
        given = {**self._special, **GIVEN, "messages": messages, "strftime_now": now.strftime}
        for part in template.generate(given):
            parts.append(part)
            length += len(part)
            if length > PROMPT_MAX_BYTES:
                break
        text = "".join(parts)
        if len(text.encode()) > PROMPT_MAX_BYTES:
            raise ValueError(f"they make a prompt of more than {PROMPT_MAX_BYTES} bytes")
        return text


class Generation(Extension):
    """`{% generation %}` marks what the model itself has said, which matters to those who train on it alone."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """Without the names by which one gets at the insides of Python."""

    def __init__(*args: Any, **names: Any) -> None:  # `self` may be one of the names
        itself, *values = args
        Namespace.__init__(itself)
        for name, value in dict(*values, **names).items():
            itself[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot have the name {name!r}")
        super().__setitem__(name, value)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["namespace"] = PlainNamespace
    environment.globals["dict"] = lambda *given, **names: dict(*given, **names)  # no type, which has more to it
    return environment


def _failed(why: str) -> Failed:
    said = why[: SENTENCE_MAX - 1].rstrip(".").encode(errors="replace").decode()
    return Failed(code=EngineFailed.code, sentence=f"{said}.")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With the spaces of Python's own, which models were trained with."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def work(parent: int) -> None:
    """Be the template's process of the process `parent`, until the end."""
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform.startswith("linux"):
        _limit(resource.RLIMIT_AS, MEMORY_MAX_BYTES)
    worker.work(parent, Asked, lambda pipe: Worker(pipe).run())


if __name__ == "__main__":
    work(int(sys.argv[1]))
