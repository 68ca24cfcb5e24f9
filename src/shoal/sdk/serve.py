"""Serving a model on this machine: a gateway here, the model in a child process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from shoal.engines import EngineFailed, warm
from shoal.errors import JobError
from shoal.gateway.admission import Admission
from shoal.gateway.prompts import read_template
from shoal.gateway.rings import LocalRing, Ring
from shoal.gateway.service import ModelService
from shoal.gateway.web import make_app
from shoal.inference.attention import kept_bytes
from shoal.inference.commands import LoadStage
from shoal.inference.process import StageProcess
from shoal.models.checkpoints import weight_files
from shoal.models.configs import BadModel, read_config
from shoal.models.stages import Shape, shape_of
from shoal.models.tokenizers import has_tokenizer, load_tokenizer
from shoal.transport.http import HttpFace
from shoal.world import Clock, Dice

SESSIONS_SHARE = 0.5
"""Part of the memory that is free when the model is loaded which sessions may take."""
SESSIONS_MAX_BYTES = 64 << 30


class ServeFailed(JobError):
    """A model could not be loaded for serving."""

    code = "SH-640"


@dataclass(frozen=True)
class ServeOptions:
    model: Path
    """A checkpoint directory, or a run folder."""
    name: str
    http: str = "127.0.0.1:0"
    keys: tuple[str, ...] = ()
    threads: int = 1
    device: str = "cpu"
    cuts: tuple[int, ...] = ()
    """Layers at which the model is cut into stages, each in a process of its own; none: all in one."""
    context: int | None = None
    say: Callable[[str], None] = lambda _: None


def checkpoint_of(path: Path) -> Path:
    """A checkpoint directory as it is, a run folder's model. Raises BadModel."""
    for place in (path, path / "model"):
        if (place / "config.json").is_file():
            return place
    if (path / "job.record").exists():
        raise BadModel(f"{path} is a run without a model; finish it with: shoal train {path} --resume")
    raise BadModel(f"{path} is neither a checkpoint directory (with a config.json) nor a run.")


class LocalServer:
    """An endpoint from `start` to `stop`."""

    def __init__(self, options: ServeOptions, clock: Clock, dice: Dice) -> None:
        self._options, self._clock, self._dice = options, clock, dice
        self._stages: list[StageProcess] = []
        self._face: HttpFace | None = None
        self.service: ModelService | None = None

    async def start(self) -> str:
        """Load and serve; gives the URL. Raises BadModel, BadTokenizer, ServeFailed, HttpFailed."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> str:
        options = self._options
        warm()
        directory = checkpoint_of(options.model)
        config = read_config(directory)
        shape = shape_of(config)
        files = weight_files(directory)
        tokenizer = load_tokenizer(str(directory) if has_tokenizer(directory) else "bytes")
        template = read_template(directory)
        context = min(shape.positions, options.context or shape.positions)
        memory = min(SESSIONS_MAX_BYTES, int(psutil.virtual_memory().available * SESSIONS_SHARE))
        ring = await self._load(config, files, shape, memory)
        per_position = kept_bytes(shape.layers, shape.key_heads, shape.head_size, 128) / 128
        self.service = ModelService(
            name=options.name,
            created=self._clock.now_ms() // 1000,
            context=context,
            tokenizer=tokenizer,
            template=template,
            ends=_ends(config, directory, tokenizer.end),
            rings=[ring],
            admission=Admission(max(context, int(memory / per_position))),
            clock=self._clock,
            dice=self._dice,
        )
        self._face = HttpFace(make_app(self.service, keys=options.keys), self._clock)
        return await self._face.start(options.http)

    async def _load(self, config: str, files: list[Path], shape: Shape, memory: int) -> Ring:
        options = self._options
        ends = [0, *options.cuts, shape.layers]
        token_ms, exact = 0.0, True
        for first, stop in itertools.pairwise(ends):
            stage = await StageProcess.start(f"layers {first} to {stop - 1}", threads=options.threads)
            self._stages.append(stage)
            try:
                loaded = await stage.load(
                    LoadStage(
                        config=config, files=tuple(map(str, files)), first=first, stop=stop,
                        memory_bytes=memory * (stop - first) // shape.layers, device=options.device,
                        threads=options.threads,
                    )
                )  # fmt: skip
            except EngineFailed as error:
                raise ServeFailed(f"{options.model} cannot be served: {error.sentence}") from error
            token_ms += loaded.layer_ms * (stop - first) + loaded.last_ms
            exact = exact and loaded.exact
            options.say(f"Layers {first} to {stop - 1} are loaded: {loaded.layer_ms * (stop - first):.1f} ms a token.")
        return LocalRing("this machine", self._stages, exact=exact, token_ms=token_ms)

    async def stop(self) -> None:
        """Twice, or before the start, is harmless."""
        if self._face is not None:
            await self._face.stop()
        for stage in self._stages:
            with contextlib.suppress(EngineFailed):
                await stage.stop()
        self._stages.clear()


def _ends(config: str, directory: Path, end: int | None) -> frozenset[int]:
    """Token ids that end an answer: those of the generation settings, of the config, and the tokenizer's own."""
    found: set[int] = set() if end is None else {end}
    sources = [config.encode()]
    with contextlib.suppress(OSError):
        sources.append((directory / "generation_config.json").read_bytes())
    for source in sources:
        try:
            fields = msgspec.json.decode(source)
        except (msgspec.DecodeError, RecursionError):
            continue
        ends = fields.get("eos_token_id") if isinstance(fields, dict) else None
        found |= {one for one in (ends if isinstance(ends, list) else [ends]) if isinstance(one, int)}
    return frozenset(found)
