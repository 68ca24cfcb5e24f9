"""From messages to token ids: by the model's own chat template, or a plain one where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import msgspec

from shoal.gateway.openai import ChatMessage
from shoal.gateway.refusals import RequestRefused
from shoal.models.configs import BadModel
from shoal.models.tokenizers import special_token

TEMPLATE_MAX_BYTES = 256 * 1024
PROMPT_MAX = 1 << 22
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ChatTemplate:
    """A checkpoint's template, run in a sandbox: it comes with the model, from whoever made that."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BadModel(f"The model's chat template cannot be read: {error}.") from error
        self._special = special

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Raises RequestRefused: a template may refuse an order of roles, for one."""
        plain = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text = self._template.render(messages=plain, add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RequestRefused(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if len(text) > PROMPT_MAX:
            raise RequestRefused(f"The messages make a prompt of {len(text)} characters.", param="messages")
        return text


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
    return ChatTemplate(source if isinstance(source, str) else PLAIN, special)


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(file.read_bytes())
    except OSError:
        return {}
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadModel(f"{file} is not JSON: {error}.") from error
    return found if isinstance(found, dict) else {}


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    text = msgspec.json.encode(value)
    return (msgspec.json.format(text, indent=indent) if indent else text).decode()


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
