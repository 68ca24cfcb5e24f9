"""Serving a model: a gateway here, and the model on nodes of the shoal, or in a child process of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from shoal.engines import EngineFailed, warm
from shoal.errors import JobError, ShoalError
from shoal.gateway.admission import Admission
from shoal.gateway.engines import EngineFinder
from shoal.gateway.guesses import Draft
from shoal.gateway.keyfile import KeyFile
from shoal.gateway.keys import Keys, parse_keys
from shoal.gateway.meeting import DIAL_DEADLINE_S
from shoal.gateway.paying import Paying
from shoal.gateway.placing import ModelOnNodes, Placer
from shoal.gateway.prompts import ChatTemplate, read_template
from shoal.gateway.receipts import Books, Metering
from shoal.gateway.remote import Rings
from shoal.gateway.rings import LocalRing, arithmetic_of
from shoal.gateway.service import STOP_S, ModelService
from shoal.gateway.web import make_app
from shoal.house import RemoteLedger
from shoal.hub import HubClient, HubState
from shoal.identity import KeyPair, blake3_hash, load_or_create_key
from shoal.inference.blocks import BLOCK, kept_bytes, padded
from shoal.inference.commands import LoadStage, StageLoaded
from shoal.inference.process import StageProcess
from shoal.models.configs import BadModel, positions_of, read_config, refuse_endless, vocabulary_of
from shoal.models.pooling import read_pooling
from shoal.models.shapes import LAYERS_NAMES, Shape, Survey, shape_of, survey
from shoal.models.tokenizers import BadTokenizer, ByteTokenizer, TextTokenizer, has_tokenizer, load_tokenizer
from shoal.models.weights import weight_files
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import sign
from shoal.protocol.money import DAY_MS
from shoal.protocol.offers import Offer
from shoal.protocol.serving import LAYERS_MAX, ModelFile, ServeJob
from shoal.sdk.spending import Spending
from shoal.sharding import ModelNeeds
from shoal.storage import BlobStore, serve
from shoal.transport import TlsEndpoint
from shoal.transport.http import HttpFace, refuse_taken
from shoal.world import Clock, Dice, DirectoryDisk, Link
from shoal.world.reach import reach

ENGINE_JOB = b"shoal/engine-job/1\x00"
"""What the receipts of engines name: a model by the name that they have for it."""
SESSIONS_SHARE = 0.5
"""Part of the memory that is free when the model is loaded which sessions may take."""
SESSIONS_MAX_BYTES = 64 << 30
DRAFT_SHARE = 0.125
"""The same for a draft model."""


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
    """API keys, each a line as a file of keys has it; none: everybody is served."""
    key_file: Path | None = None
    """The same in a file, which is read again when it has changed."""
    hubs: Sequence[HubTicket] = ()
    """Where nodes are found; none: the model is held by this machine."""
    data: Path | None = None
    """Where the gateway's key and the receipts of nodes are kept; none: a fresh key, and receipts are counted only."""
    listen: str = "tcp://127.0.0.1:0"
    """Where nodes link to the gateway."""
    sessions: int = 16
    """Streams of the model's whole context for which nodes hold memory."""
    token_ms_max: float = math.inf
    """What a token of one stream may take at nodes, with the way there and back."""
    engine_model: str = ""
    """What engines beside nodes call the model; empty where they call it by `name`."""
    engines_only: bool = False
    """Nodes hold no layers of it: its weights are not needed here."""
    threads: int = 1
    device: str = "cpu"
    cuts: tuple[int, ...] = ()
    """On this machine: layers at which the model is cut into stages, each in a process of its own."""
    context: int | None = None
    guess: bool = True
    """Whether tokens are guessed; what is said is the same."""
    draft: Path | None = None
    """A small model with the same vocabulary, held beside the gateway, that guesses."""
    spending: Spending | None = None
    """With nodes: what those that cost something may come to, with `data` for what was paid; none: only nodes that
    serve for nothing take part."""
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class _Model:
    """What is to be served, as it lies on disk."""

    directory: Path
    config: str
    engines_only: bool = False

    @functools.cached_property
    def shape(self) -> Shape:
        """Raises BadModel."""
        return shape_of(self.config)

    @property
    def layers(self) -> int:
        """1 where an engine serves it and its config does not say."""
        if not self.engines_only:
            return self.shape.layers
        fields = msgspec.json.decode(self.config)
        named = [fields[name] for name in LAYERS_NAMES if isinstance(fields.get(name), int)]
        return min(max(1, *named), LAYERS_MAX) if named else 1

    @functools.cached_property
    def files(self) -> list[Path]:
        """Raises BadModel."""
        return weight_files(self.directory)

    @functools.cached_property
    def layout(self) -> Survey:
        """Where its tensors lie. Raises BadModel."""
        return survey(self.config, self.files)

    @property
    def positions(self) -> int:
        """Raises BadModel. Engines may serve families that Shoal's own runtime does not."""
        if not self.engines_only:
            return self.shape.positions
        positions = positions_of(self.config)
        if positions is None:
            raise BadModel(f"The config in {self.directory} does not say how long a text may be.")
        return positions


def _tokenizer_of(directory: Path, config: str) -> TextTokenizer:
    """Its own, or bytes where that is what its vocabulary can be. Raises BadTokenizer, BadModel."""
    if has_tokenizer(directory):
        return load_tokenizer(str(directory))
    if vocabulary_of(config) != ByteTokenizer.vocabulary:
        raise BadTokenizer(f"{directory} holds no tokenizer; put its tokenizer.json there.")
    return load_tokenizer("bytes")


def checkpoint_of(path: Path) -> Path:
    """A checkpoint directory as it is, a run folder's model. Raises BadModel."""
    for place in (path, path / "model"):
        if (place / "config.json").is_file():
            for file in place.iterdir():
                if not file.is_dir():
                    refuse_endless(file)
            return place
    if (path / "job.record").exists():
        raise BadModel(f"{path} is a run without a model; finish it with: shoal train {path} --resume")
    raise BadModel(f"{path} is neither a checkpoint directory (with a config.json) nor a run.")


def _keys(options: ServeOptions, clock: Clock) -> Callable[[], Keys] | None:
    """Raises BadKeys."""
    if options.key_file is not None:
        return KeyFile(options.key_file, clock, options.say)
    if not options.keys:
        return None
    keys = Keys.of(parse_keys(options.keys, "the list of keys"), clock.monotonic())
    return lambda: keys


class ServedModel:
    """An endpoint from `start` to `stop`; where the model is held is for subclasses to say."""

    def __init__(self, options: ServeOptions, clock: Clock, dice: Dice) -> None:
        self.options, self.clock, self.dice = options, clock, dice
        self.service: ModelService | None = None
        self._template: ChatTemplate | None = None
        self._face: HttpFace | None = None
        self._stages: list[StageProcess] = []
        """Processes of this machine that hold layers."""

    async def start(self) -> str:
        """Load and serve; gives the URL.

        Raises BadModel, BadTokenizer, BadKeys, BadKeyFile, GatewayRunning, ServeFailed, HttpFailed, LinkError,
        EngineDied."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> str:
        options = self.options
        keys = _keys(options, self.clock)
        refuse_taken(options.http)  # before a large model is loaded in vain
        directory = checkpoint_of(options.model)
        config = read_config(directory)
        self._template = read_template(directory)
        await self._template.begin()  # it gets up while the model is looked at
        model = _Model(directory, config, options.engines_only)
        if not options.engines_only:
            _ = model.shape, model.files  # what is wrong with them is said before anything else is started
        tokenizer = _tokenizer_of(directory, config)
        pooling, generates = None, True
        if not options.engines_only:
            pooling = read_pooling(directory, config, model.shape.hidden)
            generates = model.layout.has_head
        if not generates and pooling is None:
            raise BadModel(
                f"{directory}: its files hold no head, so it says nothing; and no modules.json says how it embeds."
            )
        context = min(model.positions, options.context or model.positions)
        await self._template.start()
        self.service = ModelService(
            name=options.name,
            created=self.clock.now_ms() // 1000,
            context=context,
            tokenizer=tokenizer,
            template=self._template,
            ends=_ends(config, directory, tokenizer.end),
            rings=[],
            admission=Admission(context),
            clock=self.clock,
            dice=self.dice,
            guess=options.guess,
            pooling=pooling,
            generates=generates,
        )
        await self._hold(model, self.service)
        if options.draft is not None and options.guess:
            self.service.draft = await self._hold_draft(options.draft, model, tokenizer)
        self._face = HttpFace(make_app(self.service, keys=keys), self.clock)
        return await self._face.start(options.http)

    async def _hold_draft(self, path: Path, model: _Model, tokenizer: TextTokenizer) -> Draft:
        """The draft model in a process of this machine."""
        directory = checkpoint_of(path)
        config = read_config(directory)
        shape = shape_of(config)
        if _tokenizer_of(directory, config).of_library().get_vocab() != tokenizer.of_library().get_vocab():
            raise BadModel(f"{directory} reads texts as other tokens than {model.directory}: it cannot guess for it.")
        memory = min(SESSIONS_MAX_BYTES, int(psutil.virtual_memory().available * DRAFT_SHARE))
        command = LoadStage(
            config=config, files=tuple(map(str, weight_files(directory))), first=0, stop=shape.layers,
            memory_bytes=memory,
        )  # fmt: skip
        stage, loaded = await self._load_here("the draft model", command, f"{path} cannot be used as a draft")
        token_ms = loaded.layer_ms * shape.layers + loaded.last_ms
        self.options.say(f"The draft model is loaded: {token_ms:.1f} ms a token.")
        return Draft(stage, token_ms, shape.positions)

    async def _load_here(self, name: str, command: LoadStage, trouble: str) -> tuple[StageProcess, StageLoaded]:
        """Layers in a process of this machine, until `stop`. Raises ServeFailed, which begins with `trouble`."""
        stage = await StageProcess.start(name, threads=command.threads)
        self._stages.append(stage)
        try:
            return stage, await stage.load(command)
        except EngineFailed as error:
            raise ServeFailed(f"{trouble}: {error.sentence}") from error

    async def _hold(self, model: _Model, service: ModelService) -> None:
        """Have the model held, and fill in the service's rings and how much they admit."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Twice, or before the start, is harmless."""
        if self.service is not None:
            running = self.service.counts.running
            if running:
                self.options.say(f"{running} request(s) under way have {STOP_S:.0f} s to end; new ones are refused.")
            await self.service.stop()
        if self._face is not None:
            await self._face.stop()
        if self._template is not None:
            await self._template.stop()
        for stage in self._stages:
            with contextlib.suppress(EngineFailed):
                await stage.stop()
        self._stages.clear()


class LocalServer(ServedModel):
    """The model in child processes of this machine; it is loaded anew when one of them dies."""

    _keeping: asyncio.Task[None] | None = None

    async def _hold(self, model: _Model, service: ModelService) -> None:
        warm()
        options, layers = self.options, model.shape.layers
        memory = min(SESSIONS_MAX_BYTES, int(psutil.virtual_memory().available * SESSIONS_SHARE))
        ends = [0, *options.cuts, layers]
        stages, token_ms, kinds = list[StageProcess](), 0.0, list[tuple[int, int, str]]()
        for first, stop in itertools.pairwise(ends):
            command = LoadStage(
                config=model.config, files=tuple(map(str, model.files)), first=first, stop=stop,
                memory_bytes=memory * (stop - first) // layers, device=options.device, threads=options.threads,
            )  # fmt: skip
            stage, loaded = await self._load_here(
                f"layers {first} to {stop - 1}", command, f"{options.model} cannot be served"
            )
            stages.append(stage)
            token_ms += loaded.layer_ms * (stop - first) + loaded.last_ms
            kinds.append((first, stop, loaded.arithmetic))
            options.say(f"Layers {first} to {stop - 1} are loaded: {loaded.layer_ms * (stop - first):.1f} ms a token.")
        ring = LocalRing("this machine", stages, arithmetic=arithmetic_of(kinds), token_ms=token_ms)
        service.rings.append(ring)
        block_bytes = _cache_bytes(model.shape, layers, BLOCK)
        service.admission.positions = max(service.context, memory * BLOCK // block_bytes)
        self._keeping = asyncio.create_task(self._keep(model, service, ring, stages))

    async def _keep(self, model: _Model, service: ModelService, ring: LocalRing, stages: list[StageProcess]) -> None:
        """Streams wait for what comes in place of a ring of which a process died."""
        dead, _ = await asyncio.wait([stage.died for stage in stages], return_when=asyncio.FIRST_COMPLETED)
        service.rings.remove(ring)
        self.options.say(f"{dead.pop().result().sentence} The layers are loaded again.")
        for stage in stages:
            self._stages.remove(stage)
            await stage.kill()
        try:
            await self._hold(model, service)
        except ShoalError as error:
            self.options.say(f"Nothing serves {service.name} any more; start it again: {error.sentence}")

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        await super().stop()


class NodesServer(ServedModel):
    """The model on nodes of the shoal: layers placed and placed anew as nodes come and go, and engines beside nodes as
    they are found."""

    def __init__(self, options: ServeOptions, clock: Clock, dice: Dice) -> None:
        super().__init__(options, clock, dice)
        self._stack = contextlib.AsyncExitStack()
        self._looking: list[asyncio.Task[None]] = []
        self._silent: set[bytes] = set()
        """Hubs of which was said that they do not answer."""
        self.placer: Placer | None = None
        self.finder: EngineFinder | None = None

    async def _hold(self, model: _Model, service: ModelService) -> None:
        options = self.options
        key, books = KeyPair.generate(), None
        if options.data is not None:
            books = Books(options.data, options.say)
            self._stack.callback(books.close)
            key = load_or_create_key(options.data / "gateway.key")
        endpoint = TlsEndpoint(key)
        self._stack.push_async_callback(endpoint.close)
        await endpoint.listen(options.listen)
        hubs = HubClient(endpoint, options.hubs, clock=self.clock, dice=self.dice, on_change=self._hub_changed)
        self._stack.push_async_callback(hubs.close)
        await hubs.start()
        states = hubs.states()
        if not any(state.up for state in states):
            self._silent = {state.ticket.node for state in states}
            tried = " ".join(f"{state.ticket}: {state.trouble}" for state in states)
            options.say(f"No hub answers, so no node is found; trying goes on. {tried}")
        service.admission.positions = options.sessions * padded(service.context)
        served_as = options.engine_model or options.name
        job = blake3_hash(ENGINE_JOB + served_as.encode())
        on_nodes = None if options.engines_only else await self._on_nodes(model, service, key, endpoint)
        if options.spending is not None:
            of = on_nodes.envelope.record_id if on_nodes is not None else job
            service.paying = await self._pay(options.spending, of, key, endpoint, hubs)
        self.finder = EngineFinder(
            served_as, service.tokenizer, endpoint, hubs, self.clock, service.rings, self.dice,
            Metering(job, books, self.clock, service.counts), model.layers, options.say, service.paying,
            alone=options.engines_only, token_ms_max=options.token_ms_max, changed=self._changed,
        )  # fmt: skip
        self._looking.append(asyncio.create_task(self.finder.run()))
        if on_nodes is not None:
            metering = Metering(on_nodes.envelope.record_id, books, self.clock, service.counts)
            self.placer = Placer(
                on_nodes, endpoint, hubs, self.clock, self.dice, Rings(endpoint), service.rings, options.say, metering,
                service.paying, self.finder if service.generates else None,
            )  # fmt: skip
            self._stack.push_async_callback(self.placer.close)
            self._looking.append(asyncio.create_task(self.placer.run()))

    def _hub_changed(self, hub: HubState) -> None:
        if not hub.up:
            self._silent.add(hub.ticket.node)
            self.options.say(
                f"Hub {hub.ticket} cannot be reached any more: {hub.trouble.rstrip('.')}. What serves goes on; trying "
                "goes on, too."
            )
        elif hub.ticket.node in self._silent:
            self._silent.remove(hub.ticket.node)
            self.options.say(f"Hub {hub.ticket} answers now.")

    async def _on_nodes(
        self, model: _Model, service: ModelService, key: KeyPair, endpoint: TlsEndpoint
    ) -> ModelOnNodes:
        """What nodes need to hold layers of the model; they fetch its files from here."""
        options, shape = self.options, model.shape
        found = model.layout
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-serve-"))
        size = sum(file.stat().st_size for file in model.files)
        store = BlobStore(Path(folder), 2 * size + (1 << 30), self.clock)
        self._stack.callback(store.close)
        serve(endpoint, store)
        files = []
        for file in model.files:
            blob = await asyncio.to_thread(store.adopt, file)
            store.pin("serve", blob.hash)
            files.append(ModelFile(name=file.name, blob=blob))
        job = ServeJob(
            name=options.name, created_ms=self.clock.now_ms(), config=model.config, layers=shape.layers,
            files=tuple(files),
        )  # fmt: skip
        needs = ModelNeeds(
            layers=shape.layers,
            layer_bytes=max(found.layer_bytes),
            cache_bytes=options.sessions * _cache_bytes(shape, 1, service.context),
            first_bytes=found.first_bytes,
            last_bytes=found.last_bytes,
            token_ms_max=options.token_ms_max,
        )
        holder = BlobHolder(key.node_id, tuple(endpoint.addresses))
        return ModelOnNodes(job, sign(key, job), needs, found.parts_of, holder)

    async def _pay(
        self, spending: Spending, job: bytes, key: KeyPair, endpoint: TlsEndpoint, hubs: HubClient
    ) -> Paying:
        """What pays nodes, once a former gateway's money was asked back. Raises ServeFailed, PaymentsDamaged, NoMoney,
        and what the ledger does."""
        if self.options.data is None:
            raise ServeFailed("A gateway that pays keeps what it paid on a disk: name a folder with --data.")

        async def link(node: bytes, offer: Offer) -> Link:
            return await reach(
                node, offer, endpoint=endpoint, directory=hubs, clock=self.clock, dial_deadline_s=DIAL_DEADLINE_S
            )

        ledger = RemoteLedger(endpoint, spending.ledger, self.clock)
        paying = Paying(
            spending.funds(ledger, DAY_MS), DirectoryDisk(self.options.data), key=key, endpoint=endpoint, link=link,
            clock=self.clock, dice=self.dice, say=self.options.say, job=job,
        )  # fmt: skip
        await paying.begin()
        self._stack.push_async_callback(paying.close)
        self._looking.append(asyncio.create_task(paying.run(self._changed)))
        return paying

    def _changed(self) -> None:
        if self.placer is not None:
            self.placer.wake()

    async def stop(self) -> None:
        await super().stop()
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)
        if self.finder is not None:
            await self.finder.close()
        await self._stack.aclose()


def _cache_bytes(shape: Shape, layers: int, positions: int) -> int:
    """What a session of so many positions keeps in so many layers."""
    return kept_bytes(layers, shape.key_heads, shape.head_size, positions)


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
