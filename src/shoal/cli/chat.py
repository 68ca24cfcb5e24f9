"""Talking to a model in the terminal: `shoal chat`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from shoal.cli.app import JOBS, app
from shoal.cli.output import BadFlag, HubFlag, Interrupted, JsonFlag, err, out, print_json, shown
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.sdk.chat import Answer, Chat

QUESTION_MAX_BYTES = 1 << 20
HELP = "/reset begins anew, /system TEXT says how the model should be, /exit or Ctrl-D ends; Ctrl-C ends an answer."


@app.command("chat", rich_help_panel=JOBS)
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model's name at the endpoint, or a checkpoint directory or run folder, which is then served for as "
            "long as the conversation lasts.",
            show_default="the only one at the endpoint",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="Ask this and end.", show_default="a conversation"),
    ] = None,
    url: Annotated[str, typer.Option(help="The endpoint.")] = "http://127.0.0.1:8000/v1",
    system: Annotated[str, typer.Option(help="What the model is told before everything.", show_default=False)] = "",
    temperature: Annotated[
        float | None, typer.Option(help="0: always the likeliest word; up to 2.", show_default="the endpoint's: 1")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="How long an answer may be.", show_default="what is left of the context")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer again.", show_default="drawn")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="A file with the API key.", show_default="SHOAL_API_KEY")
    ] = None,
    hub: HubFlag = None,
    here: Annotated[
        bool, typer.Option("--here", help="Hold a directory's model on this machine, whatever nodes there are.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Talk to a model: one that `shoal serve` or anybody else serves, or one in a directory.

    `shoal chat runs/quickstart` serves what was trained, on the nodes at the hubs or on this machine, and ends that with
    the conversation. `shoal chat MODEL "a question"` asks once; a question is also taken from a pipe:
    `echo hi | shoal chat`. `--json` prints the whole answer of one question.

    In a conversation: /reset begins anew, /system TEXT says how the model should be, /exit or Ctrl-D ends. Ctrl-C ends
    an answer. What no longer fits into the model's context is forgotten from its beginning, and that is said.
    """  # fmt: skip
    from shoal.sdk.chat import Chat, ChatEndpoint, serving

    if temperature is not None and not 0 <= temperature <= 2:
        raise BadFlag(f"--temperature {temperature} cannot be used: from 0 to 2.")
    if max_tokens is not None and max_tokens < 1:
        raise BadFlag(f"--max-tokens {max_tokens} cannot be used: at least one is needed.")
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.buffer.read(QUESTION_MAX_BYTES + 1).decode(errors="replace").strip()
        if not question:
            taken = f" {model} was taken for the model; ask it with: shoal chat MODEL QUESTION" if model else ""
            raise BadFlag(f"There is no question: standard input is empty.{taken}")
    if question is not None and len(question) > QUESTION_MAX_BYTES:
        raise BadFlag(f"The question is longer than {QUESTION_MAX_BYTES} characters.")
    if question is None and json:
        raise BadFlag('--json needs a question: shoal chat MODEL "a question" --json')
    given = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    settings = {name: value for name, value in given.items() if value is not None}
    with contextlib.ExitStack() as stack:
        directory = Path(model) if model is not None and Path(model).is_dir() else None
        key = None
        if directory is None:
            key = _key(key_file)
        else:
            with err.status(f"Loading {escape(shown(str(directory)))}"):
                url = stack.enter_context(serving(directory, hubs=hub or (), here=here))
            model = None
        endpoint = ChatEndpoint(url, key)
        stack.callback(endpoint.close)
        name, context = _chosen(model, endpoint.models(), url)
        talk = Chat(endpoint, name, context, system, settings)
        if question is None:
            out.print(f"[bold]{escape(shown(name))}[/] at {escape(url)}. [dim]{HELP}[/]", soft_wrap=True)
            _converse(talk)
        else:
            _ask_once(talk, question, as_json=json)


def _chosen(model: str | None, served: dict[str, int | None], url: str) -> tuple[str, int | None]:
    named = ", ".join(served)
    if model is None:
        if len(served) != 1:
            raise BadFlag(f"{len(served)} models are served at {url}; name one of them: {named}." if served
                          else f"No model is served at {url}.")  # fmt: skip
        model = next(iter(served))
    elif model not in served:
        raise BadFlag(
            f"{model} is neither a directory nor served at {url}; there is: {named or 'nothing'}. A question comes after "
            "the model: shoal chat MODEL QUESTION"
        )
    return model, served[model]


def _key(file: Path | None) -> str | None:
    """The first key in a file, which may be one of `shoal serve`; else SHOAL_API_KEY."""
    if file is None:
        return os.environ.get("SHOAL_API_KEY") or None
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFlag(f"--key-file {file} cannot be read: {error}.") from error
    words = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not words or not words[0].isascii():
        raise BadFlag(f"--key-file {file} holds no key.")
    return words[0]


def _ask_once(talk: Chat, question: str, *, as_json: bool) -> None:
    answer = talk.ask(question, (lambda _: None) if as_json else _say)
    if answer.finish == "interrupted":
        raise Interrupted("Stopped.")
    if as_json:
        print_json(answer)
    else:
        out.print()


def _converse(talk: Chat) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its editing and history
    while True:
        try:
            line = input("> ")
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            out.print(f"\n[dim]{HELP}[/]", soft_wrap=True)
            continue
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            talk.turns.clear()
            _note("Begun anew.")
        elif command == "/system":
            talk.system = rest.strip()
            _note("Understood; it holds from the next question on." if talk.system else "There is no system text now.")
        elif command.startswith("/"):
            _note(f"{HELP} To say it to the model, put a space before it.")
        elif line.strip():
            _ask(talk, line.strip())


def _ask(talk: Chat, question: str) -> None:
    try:
        answer = talk.ask(question, _say)
    except ShoalError as error:  # the conversation goes on; the question was not kept
        out.print()
        err.print(f"[bold red]error[/] [dim]{error.code}[/]  ", end="")
        err.print(shown(error.sentence), markup=False, soft_wrap=True)
        return
    out.print()
    _note_ends(answer, talk)


def _say(piece: str) -> None:
    out.print(shown(piece), end="", markup=False, soft_wrap=True)


def _note_ends(answer: Answer, talk: Chat) -> None:
    """What is to be said about an answer, under it."""
    if answer.finish == "interrupted":
        _note("Ended by you; what was said of it stays in the conversation.")
    elif answer.finish == "length":
        _note(
            f"It ends here: {'--max-tokens was reached' if 'max_tokens' in talk.settings else 'the context is full'}."
        )
    if answer.dropped:
        _note(f"The conversation had outgrown the context: its {answer.dropped} oldest turn(s) are forgotten.")


def _note(sentence: str) -> None:
    err.print(sentence, style="dim", markup=False, soft_wrap=True)
