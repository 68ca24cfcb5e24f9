"""A model's chat template in its process: whatever it does, one request is refused, and the next one is served."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from shoal.engines import FRAME, EngineDied
from shoal.gateway import prompts, template_worker
from shoal.gateway.openai import ChatMessage
from shoal.gateway.prompts import ChatTemplate, read_template
from shoal.gateway.refusals import Overloaded, RequestRefused
from shoal.gateway.template_commands import Asked, LoadTemplate, RenderTemplate, TemplateMessage
from shoal.models.configs import BadModel
from shoal.world import SystemClock

GENEROUS_S = 120.0
ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set kept = namespace(text='x') %}{% for i in range(99) %}{% set kept.text = kept.text ~ kept.text %}"


def said(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


def hostile(what: str) -> ChatTemplate:
    """It does `what` where the first message says `evil`, and is honest otherwise. `one` is 1, and no constant."""
    return ChatTemplate(
        "{% set one = messages | length %}{% if messages[0].content == 'evil' %}" + what + "{% else %}"
        "<{{ messages[0].content }}>{{ bos_token }}{% endif %}",
        {"bos_token": "^"},
    )


def with_template(template: ChatTemplate, scene: Callable[[], Awaitable[None]]) -> None:
    troubles: list[object] = []

    async def life() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, trouble: troubles.append(trouble))
        try:
            await template.start()
            await scene()
        finally:
            await template.stop()
        gc.collect()
        assert its_processes() == [] == troubles

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


def its_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "shoal.gateway.template_worker" in child.cmdline():
                found.append(child)
    return found


def its_pid() -> int:
    (process,) = its_processes()
    return int(process.pid)


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("{% set n = one + 8 %}{{ n ** (n ** n) }}", "takes longer than 5 s for these messages and was stopped."),
        (ENDLESS, "takes longer than 5 s for these messages and was stopped."),
        ("{{ 'x' * (one * 10 ** 10) }}", "refuses these messages: it takes more than 512 MiB of memory."),
        (DOUBLING + "{% endfor %}", "refuses these messages: it takes more than 512 MiB of memory."),
        ("{% for i in range(99999) %}{{ 'x' * (one * 999) }}{% endfor %}", "a prompt of more than 4193280 bytes."),
        ("{% for i in range(99999) %}{{ '\u4e00' * (one * 21) }}{% endfor %}", "a prompt of more than 4193280 bytes."),
        ("{% macro deeper(n) %}{{ deeper(n + 1) }}{% endmacro %}{{ deeper(one) }}", "maximum recursion depth"),
        ("{% for i in range(one * 10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('No king. ' * 99) }}", "refuses these messages: No king. No king."),
        ("{{ raise_exception((one + 8) ** 9999) }}", "breaks off at these messages: The engine of the chat template"),
        ("{{ one / 0 }}", "refuses these messages: division by zero."),
        (r"{{ '\ud800' }}", "surrogates not allowed."),
        ("{{ one.__class__.mro() }}", "unsafe"),
        ("{% set ns = namespace(__class__=one) %}", "cannot have the name '__class__'"),
        ("{% set ns = namespace() %}{% set ns._x = one %}", "cannot have the name '_x'"),
    ],
)
def test_whatever_a_template_does_one_request_is_refused_and_the_next_one_served(what: str, part: str) -> None:
    template = hostile(what)

    async def scene() -> None:
        for _ in range(2 if "longer" not in part else 1):
            with pytest.raises(RequestRefused) as refused:
                await template.render(said("evil"))
            assert part in refused.value.sentence and len(refused.value.sentence) < 600
            assert refused.value.answer.error.param == "messages" and refused.value.status == 400
            assert await template.render(said("good")) == "<good>^"

    with_template(template, scene)


CONVERSATION = [("system", "Be \u201cbrief\u201d. "), ("user", " <b>Hi</b> & \n"), ("assistant", ""), ("user", "again")]


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message.content | trim }}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "{% if tools is not none %}TOOLS{% endif %}{% if documents is none and not tools %}none{% endif %}"
        "{{ tools is defined }}{{ builtin_tools is defined }}{{ eos_token }}",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{{ {'b': '<\u00e9>', 'a': [1, 2.5, none]} | tojson }}"
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
        "{%- for message in messages -%}{%- if message.role == 'assistant' %}{% generation %}[{{ message.content }}]"
        "{% endgeneration %}{% continue %}{% endif %}{{ loop.index0 }}{% if loop.index0 > 2 %}{% break %}{% endif %}\n"
        "{%- endfor -%}",
        "{% set ns = namespace(found=false, self=1) %}{% for message in messages %}{% if message.role == 'user' %}"
        "{% set ns.found = loop.index %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.self }}{{ dict(a=1) }}"
        "{% for name, value in messages[1].items() %}{{ name }}={{ value }};{% endfor %}",
        "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y')[3:] }}{% endif -%}\n  {# nothing #}\n  x",
        "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}{{ rest | length }}"
        "{{ messages[-1]['content'].startswith('a') }}{{ messages[1].content.split('b') }}{{ messages | last }}",
    ],
)
def test_a_prompt_is_what_transformers_makes_of_it(source: str) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = [{"role": role, "content": content} for role, content in CONVERSATION]
    (wanted,), _ = render_jinja_template([plain], chat_template=source, add_generation_prompt=True, **special)
    template = ChatTemplate(source, special)

    async def scene() -> None:
        messages = [ChatMessage(role=role, content=content) for role, content in CONVERSATION]
        assert await template.render(messages, SystemClock().now_ms()) == wanted

    with_template(template, scene)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("{{ 9 ** (9 ** 9) }}", "took more processor time than it may."),  # computed as it is read: a constant
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "maximum recursion depth exceeded"),
        ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "too many statically nested blocks"),
        ("{% for %}", "cannot be read: Expected"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_at_the_start(source: str, part: str) -> None:
    async def scene() -> None:
        template = ChatTemplate(source, {})
        with pytest.raises(BadModel, match=r"^The model's chat template cannot be read: ") as refused:
            await template.start()
        assert part in refused.value.sentence and its_processes() == []

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_what_cannot_be_read_again_refuses_the_request() -> None:
    template = ChatTemplate("{% for %}", {})

    async def scene() -> None:
        with pytest.raises(RequestRefused, match="cannot be read: Expected"):
            await template.render(said("good"))
        assert its_processes() == []

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_template_has_a_largest_size_wherever_it_stands(tmp_path: Path) -> None:
    large = "x" * (prompts.TEMPLATE_MAX_BYTES + 1)
    (tmp_path / "tokenizer_config.json").write_bytes(msgspec.json.encode({"chat_template": large}))
    with pytest.raises(BadModel, match="larger than 262144 bytes"):
        read_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(large)
    with pytest.raises(BadModel, match="larger than 262144 bytes"):
        read_template(tmp_path)


def test_many_at_once_have_their_own_texts_of_one_process_also_around_a_hostile_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompts, "TURN_S", GENEROUS_S)
    template = hostile(ENDLESS)

    async def scene() -> None:
        first = its_pid()
        texts = [f"{number}" * (1 if number % 50 else 400_000) for number in range(100, 300)]
        prompts_made = await asyncio.gather(*(template.render(said(text)) for text in texts))
        assert prompts_made == [f"<{text}>^" for text in texts]
        assert its_pid() == first
        order: list[str] = []

        async def ask(text: str) -> None:
            try:
                assert await template.render(said(text)) == f"<{text}>^"
            except RequestRefused:
                assert text == "evil"
            order.append(text)

        texts = ["a", "b", "evil", "c", "d"]
        await asyncio.gather(*map(ask, texts))
        assert order == texts and its_pid() != first

    with_template(template, scene)


def test_who_waits_behind_a_hostile_one_does_not_wait_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TURN_S", 0.1)
    template = hostile(ENDLESS)

    async def scene() -> None:
        evil = asyncio.create_task(template.render(said("evil")))
        for asked in [asyncio.create_task(template.render(said("good"))) for _ in range(5)]:
            with pytest.raises(Overloaded, match="busy with other requests; try again later") as refused:
                await asked
            assert refused.value.retry_after_s == 0.1 and not evil.done()
        with pytest.raises(RequestRefused, match="takes longer"):
            await evil
        assert await template.render(said("good")) == "<good>^"

    with_template(template, scene)


def test_a_process_that_is_killed_between_or_during_requests_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "RENDER_S", GENEROUS_S)
    template = hostile(ENDLESS)

    async def scene() -> None:
        for _ in range(3):  # between
            os.kill(its_pid(), signal.SIGKILL)
            assert await template.render(said("good")) == "<good>^"
        first = its_pid()
        os.kill(first, signal.SIGSTOP)  # during
        asked = [asyncio.create_task(template.render(said(text))) for text in "abc"]
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        assert await asyncio.gather(*asked) == ["<a>^", "<b>^", "<c>^"]

        evil = asyncio.create_task(template.render(said("evil")))
        for _ in range(prompts.TRIES):  # one that is lost again and again is not tried without end
            process = await computing()
            process.kill()
            while process in its_processes():
                await asyncio.sleep(0)
        with pytest.raises(RequestRefused, match=r"breaks off at these messages: .* was killed \(SIGKILL\)"):
            await evil
        assert await template.render(said("good")) == "<good>^"

    async def computing() -> psutil.Process:
        """The process, once it has computed longer than it takes to begin."""
        while True:
            for process in its_processes():
                if process.cpu_times().user > 1.5:
                    return process
            await asyncio.sleep(0.01)

    with_template(template, scene)


def test_who_hangs_up_takes_nothing_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TURN_S", GENEROUS_S)
    template = hostile(ENDLESS)

    async def scene() -> None:
        process = psutil.Process(its_pid())
        process.suspend()
        asked = [asyncio.create_task(template.render(said(text))) for text in ("rendered", "waits", "good", "too")]
        await asyncio.sleep(0)
        asked[0].cancel()
        asked[1].cancel()
        await asyncio.sleep(0)
        process.resume()
        assert await asyncio.gather(*asked[2:]) == ["<good>^", "<too>^"]
        assert asked[0].cancelled() and asked[1].cancelled() and its_pid() == process.pid

        evil = asyncio.create_task(template.render(said("evil")))
        await asyncio.sleep(0)
        evil.cancel()
        assert await template.render(said("good")) == "<good>^"  # not refused for what another one asked
        assert evil.cancelled() and its_pid() != process.pid

    with_template(template, scene)


def test_a_template_that_is_stopped_starts_no_process_again() -> None:
    template = hostile(ENDLESS)

    async def scene() -> None:
        evil, waits = (asyncio.create_task(template.render(said(text))) for text in ("evil", "good"))
        await asyncio.sleep(0)
        await template.stop()
        for asked in (evil, waits):
            with pytest.raises(EngineDied, match="The endpoint is stopping."):
                await asked

    with_template(template, scene)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_the_process_knows_nothing_that_it_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "s3cr3t")
    template = hostile(ENDLESS)

    async def scene() -> None:
        process = psutil.Process(its_pid())
        assert set(process.environ()) <= set(prompts.ENVIRONMENT)
        libraries = Path(f"/proc/{process.pid}/maps").read_text()
        assert "msgspec" in libraries
        assert not any(name in libraries for name in ("torch", "tokenizers", "safetensors", "numpy"))
        assert process.open_files() == []

    with_template(template, scene)


GATEWAY = f"""
import asyncio
from shoal.gateway.openai import ChatMessage
from shoal.gateway.prompts import ChatTemplate
async def main():
    template = ChatTemplate({ENDLESS!r}, {{}})
    await template.start()
    asking = asyncio.create_task(template.render([ChatMessage(role="user", content="x")]))
    await asyncio.sleep(0)
    print(template._process.pid, flush=True)
    await asking
asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere its bound on processor time does it")
def test_the_process_dies_with_a_gateway_that_is_killed_while_it_computes() -> None:
    gateway = subprocess.Popen([sys.executable, "-c", GATEWAY], stdout=subprocess.PIPE)
    try:
        assert gateway.stdout is not None
        child = psutil.Process(int(gateway.stdout.readline()))
    finally:
        gateway.kill()
        gateway.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(GENEROUS_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("source", ["x", ENDLESS])
def test_the_process_ends_by_itself_when_nobody_speaks_to_it_any_more(source: str) -> None:
    """At the end of its stdin, and while it computes at its bound on processor time, which is for each command."""
    command = [sys.executable, "-m", template_worker.__name__, str(os.getpid())]
    commands = [LoadTemplate(source=source, special={}), RenderTemplate(messages=[TemplateMessage("user", "x")])]
    frames = [msgspec.msgpack.encode(Asked(number, one)) for number, one in enumerate(commands)]
    done = subprocess.run(
        command, input=b"".join(FRAME.pack(len(frame)) + frame for frame in frames), capture_output=True,
        timeout=GENEROUS_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGXCPU if source == ENDLESS else 0, b"")
    assert (b"Rendered" in done.stdout) == (source == "x")
