"""Serving a model: `shoal serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
import typer

from shoal.cli.app import JOBS, app
from shoal.cli.output import BadFlag, JsonFlag, err, out, print_json, run, until_stopped
from shoal.world import SystemClock, SystemDice

KEYS_MAX = 64


@app.command("serve", rich_help_panel=JOBS)
def serve(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint directory in Hugging Face format, or a run folder of `shoal train`.")
    ],
    name: Annotated[str | None, typer.Option(help="What clients call it.", show_default="the directory's name")] = None,
    http: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the endpoint is; port 0 takes a free one.")] = (
        "127.0.0.1:8000"
    ),
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="A file of API keys, one a line, of which every request must carry one.", show_default="none asked"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads to compute with.", show_default="all physical cores")
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device such as cpu, cuda or mps.")] = "cpu",
    json: JsonFlag = False,
) -> None:
    """Serve a model to OpenAI clients, on this machine.

    `shoal serve runs/quickstart` serves what was trained. Then, with any OpenAI client, base URL
    http://127.0.0.1:8000/v1; or with curl as it prints.

    Families that are served: llama, mistral, qwen2, qwen3, gemma, gemma2, phi3, gpt2, gpt_neox. Tokens are those of
    plain transformers, and do not depend on what else is served at the time.
    """  # fmt: skip
    from shoal.sdk.serve import LocalServer, ServeOptions

    if threads is not None and threads < 1:
        raise BadFlag(f"--threads {threads} cannot be used: at least one is needed.")
    keys = _keys(api_keys) if api_keys is not None else ()
    called = name or (model.resolve().parent.name if model.resolve().name == "model" else model.resolve().name)
    options = ServeOptions(
        model=model,
        name=called,
        http=http,
        keys=keys,
        threads=threads or psutil.cpu_count(logical=False) or 1,
        device=device,
        say=lambda sentence: err.print(sentence, markup=False, style="dim"),
    )

    async def work() -> None:
        server = LocalServer(options, SystemClock(), SystemDice())
        url = await server.start()
        service = server.service
        assert service is not None
        try:
            if json:
                print_json({"ready": "serve", "url": f"{url}/v1", "model": called, "context": service.context,
                            "exact": service.rings[0].exact, "pid": os.getpid()})  # fmt: skip
            else:
                out.print(
                    f"[bold]{called}[/] is served at {url}/v1, {service.context} tokens of context.", soft_wrap=True
                )
                key = "-H 'Authorization: Bearer KEY' " if keys else ""
                body = msgspec.json.encode(
                    {"model": called, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
                ).decode()
                out.print(f"  curl {url}/v1/chat/completions {key}-d '{body}'", markup=False, soft_wrap=True)
                out.print("[dim]Ctrl-C stops it.[/]")
            await until_stopped()
        finally:
            await server.stop()

    run(work)


def _keys(file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadFlag(f"--api-keys {file} cannot be read: {error}.") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not 1 <= len(keys) <= KEYS_MAX:
        raise BadFlag(f"--api-keys {file} has {len(keys)} keys; from 1 to {KEYS_MAX} can be used.")
    return keys
