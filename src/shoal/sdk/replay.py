"""`shoal replay`: one node's round, recomputed from a run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from shoal.driver.audit import open_from_member
from shoal.driver.chain import Chain, read_record
from shoal.driver.folder import RunFolder
from shoal.driver.gang import link_to
from shoal.driver.replay import NotOpened, Replayer, find_contribution
from shoal.errors import BadInput, ShoalError
from shoal.hub import HubClient
from shoal.identity import KeyPair
from shoal.protocol.hubs import HubTicket
from shoal.protocol.offers import OfferFind
from shoal.protocol.training import Contribution
from shoal.sdk.loop_script import engine_for, loops_folder
from shoal.storage import BlobStore, Fetcher, find_blob
from shoal.transport import TlsEndpoint
from shoal.world import Clock, Dice

STORE_BYTES = 16 << 30


class NoSuchNode(BadInput):
    """No node of a run is called so."""

    code = "SH-127"


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `shoal replay` found."""

    verdict: str
    """match, mismatch or not replayable."""
    sentence: str
    difference: float | None
    threshold: float | None
    measure: str
    round: int
    node: str
    name: str
    rounds_computed: int
    opened_bytes: int


async def replay_round(
    run_folder: Path,
    round_number: int,
    node: str,
    *,
    key: KeyPair,
    hubs: Sequence[HubTicket],
    clock: Clock,
    dice: Dice,
    listen: str | None = "tcp://127.0.0.1:0",
    threads: int | None = None,
    device: str = "cpu",
    script: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ReplayResult:
    """Replay a node's contribution to a round. Private state comes from the run's own folder, from node folders beneath
    it, or from the node itself, found through `hubs`; one that cannot be dialled links to this side at `listen`. A
    user's own loop is replayed by running its `script`. Raises BadInput for a round or node that the run does not have,
    and NoScript."""
    with RunFolder.open(run_folder, read_only=True) as folder:
        chain = read_record(folder)
    node_id, name = find_node(chain, node)
    contribution = find_contribution(chain.record, chain.node_of, round_number, node_id)
    stores = [folder.blobs, *sorted(folder.local.glob("nodes/*/blobs"))]
    start_engine = engine_for(chain.record.job, script)
    if script is not None:  # processes of this job on this machine
        stores += sorted(loops_folder(chain.record.job.name).glob("*/blobs"))
    with tempfile.TemporaryDirectory(prefix="shoal-replay-") as scratch:
        opener = _Opener(chain, stores, node_id, name, key, hubs, listen, clock, dice, Path(scratch))
        replayer = Replayer(
            chain.record,
            find_blob=opener.find,
            open_private=opener.open,
            scratch=Path(scratch),
            threads=threads,
            device=device,
            start_engine=start_engine,
        )
        try:
            replayed = await replayer.replay(contribution, say)
        finally:
            await replayer.close()
            await opener.close()
    verdict = replayed.verdict
    return ReplayResult(
        verdict=verdict.outcome.value,
        sentence=verdict.sentence,
        difference=verdict.measured,
        threshold=verdict.threshold,
        measure=verdict.measure,
        round=round_number,
        node=node_id.hex(),
        name=name,
        rounds_computed=replayed.rounds,
        opened_bytes=replayed.opened_bytes,
    )


def find_node(chain: Chain, wanted: str) -> tuple[bytes, str]:
    """A node by name or by the beginning of its id. Raises NoSuchNode."""
    names = chain.node_names
    found = [(node, name) for node, name in names.items() if name == wanted]
    if not found and len(wanted) >= 4:
        found = [(node, name) for node, name in names.items() if node.hex().startswith(wanted.lower())]
    if len(found) == 1:
        return found[0]
    if not names:
        raise NoSuchNode(f"No node of this run is called {wanted!r}: no work was accepted in it yet.")
    known = ", ".join(sorted(names.values()))
    problem = "More than one node is" if found else "No node of this run is"
    raise NoSuchNode(f"{problem} called {wanted!r}; there are {known}.")


class _Opener:
    """Finds blobs near first, then at the node."""

    def __init__(
        self,
        chain: Chain,
        stores: Sequence[Path],
        node: bytes,
        name: str,
        key: KeyPair,
        hubs: Sequence[HubTicket],
        listen: str | None,
        clock: Clock,
        dice: Dice,
        scratch: Path,
    ) -> None:
        self._chain = chain
        self._stores = stores
        self._node = node
        self._name = name
        self._key = key
        self._hubs = hubs
        self._listen = listen
        self._clock = clock
        self._dice = dice
        self._scratch = scratch
        self._endpoint: TlsEndpoint | None = None
        self._client: HubClient | None = None
        self._store: BlobStore | None = None
        self._unreached: ShoalError | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._store is not None:
            self._store.close()

    async def find(self, name: bytes) -> Path:
        for store in self._stores:
            path = find_blob(store, name)
            if path is not None:
                return path
        raise NotOpened(f"Blob {name.hex()[:12]} is not in the run folder.")

    async def open(self, contribution: Contribution, private: bytes) -> Path:
        try:
            return await self.find(private)
        except NotOpened:
            if not self._hubs:
                raise NotOpened(
                    f"Node {self._name} keeps the private state {private.hex()[:12]}, if anyone does, and no hub is "
                    "known through which to reach it; name one with --hub."
                ) from None
        if self._unreached is not None:
            raise self._unreached
        try:
            endpoint, fetcher = await self._reach()
        except ShoalError as error:
            self._unreached = error  # trying takes seconds, and there may be hundreds of older states to ask for
            raise
        return await open_from_member(
            contribution,
            private,
            self._node,
            job=self._chain.record.job,
            job_id=self._chain.record.job_id,
            endpoint=endpoint,
            fetcher=fetcher,
        )

    async def _reach(self) -> tuple[TlsEndpoint, Fetcher]:
        if self._endpoint is None:
            self._endpoint = TlsEndpoint(self._key, clock=self._clock, dice=self._dice)
        if self._client is None:
            if self._listen is not None:
                await self._endpoint.listen(self._listen)
            self._client = HubClient(self._endpoint, self._hubs, clock=self._clock, dice=self._dice)
            await self._client.start()
        if self._store is None:
            self._store = BlobStore(self._scratch / "blobs", STORE_BYTES, self._clock)
        if self._node not in self._endpoint.links():
            found = await self._client.find(OfferFind(node=self._node))
            if not found:
                raise ShoalError(f"Node {self._name} is not offered at the hubs, so it cannot open its private state.")
            await link_to(
                self._node, found[0].offer, endpoint=self._endpoint, directory=self._client, clock=self._clock
            )
        return self._endpoint, Fetcher(self._endpoint, self._store, self._clock, self._dice)
