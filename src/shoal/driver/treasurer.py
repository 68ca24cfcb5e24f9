"""Pays for a training job: a voucher after each Commit, for every node whose work it accepted, at the speed that the
node measured; and leaves those that are not worth their money."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence

from shoal.driver.folder import RunFolder
from shoal.driver.gang import LinkedNode, fastest_float32
from shoal.driver.lines import Event
from shoal.errors import StorageError
from shoal.identity import KeyPair
from shoal.market.earnings import Earnings, say_dear, say_idle
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.offers import Offer
from shoal.purse.bills import FILE
from shoal.purse.purse import Funds, Purse
from shoal.quantities.money import MICRO, format_money
from shoal.world import Clock, Dice, Link
from shoal.world.quotes import NotSecured, is_free


class Treasurer(Purse):
    """Pays for one term of a job."""

    def __init__(
        self,
        funds: Funds,
        folder: RunFolder,
        *,
        key: KeyPair,
        link: Callable[[bytes, Offer], Awaitable[Link]],
        clock: Clock,
        dice: Dice,
        say: Callable[[str], None],
        network: str = DEFAULT_NETWORK,
        deputy: bytes | None = None,
        present: Callable[[], Collection[bytes]] = tuple,
    ) -> None:
        """`key` is the driver's, or that of the client whose `deputy` it is. `link` gives an open link to a node.
        `present` are the driver keys of hosts that are there now: who is paid for that is paid for the time. Raises
        FolderDamaged."""
        self._folder, self._present, self._watcher = folder, present, say
        super().__init__(
            funds,
            folder.payments(),
            lambda content: folder.write(FILE, content),
            key=key,
            link=link,
            clock=clock,
            dice=dice,
            say=self._tell,
            again="--resume",
            network=network,
            deputy=deputy,
        )
        self._driven_s = clock.monotonic()
        self._driven: dict[bytes, tuple[int, float]] = {}
        """Hosts: what each had got before this driver, and the seconds that it was there since."""
        self._chosen: list[tuple[int, float]] = []
        """Price of an hour and FLOP/s of the nodes with which the job began."""
        self._earnings: dict[bytes, Earnings] = {}
        self._done: dict[bytes, tuple[int, int]] = {}
        """Accepted contributions and tokens of each node."""
        self._idle: dict[bytes, str] = {}
        """Nodes that were left for what they cost, and why."""
        self._dearest_micro = 0
        """What the dearest of this term's Commits cost."""
        self.spent = False
        """The job stops as the next Commit could not be paid."""

    async def used_up(self) -> str | None:
        """Why the job has to stop here, if it has to: the next Commit could not be paid. Says beforehand when that
        comes near. The ledger is asked first whether there is more."""
        if self.ends_soon or self._is_spent or self.runs_low(4 * self._dearest_micro):
            await self.look_soon()
        left, currency = self.left_micro, self.funds.ledger.name.currency
        if self.ends_soon:
            return "The escrow that its nodes are paid out of ends now. Nothing is lost: --resume opens another one."
        if self._is_spent:
            self.spent = True
            return (
                f"The budget of {format_money(self._budget_micro)} {currency} is used up: {format_money(left)} is "
                f"left, and a round costs up to {format_money(self._dearest_micro)}. Nothing is lost: --resume goes on "
                "from here with a larger --budget."
            )
        if self.runs_low(4 * self._dearest_micro):
            self.warn("about {}", "the job stops")
        return None

    @property
    def _is_spent(self) -> bool:
        """Two rounds more could not be paid."""
        return self.left_micro < 2 * self._dearest_micro

    # ---- places and money ----

    async def hold(
        self, gang: Sequence[LinkedNode], nodes_min: int, spares: Sequence[LinkedNode] = ()
    ) -> list[LinkedNode]:
        """Have all of them keep a place, and of `spares`, the cheapest first and of these those with most slots, as
        many as it takes to come to `nodes_min`; gives those that do, and those of the gang that cost nothing. Raises
        NotSecured where they are fewer; none is kept then."""
        free = [node for node in gang if is_free(node.offer)]
        at_least = max(0, nodes_min - len(free))
        priced = self._worth_it([node for node in gang if not is_free(node.offer)], at_least)
        others = sorted(
            (node for node in spares if not is_free(node.offer)),
            key=lambda one: (_price_of(one)[0], -one.offer.slots),
        )
        asked = [*priced.values(), *others]
        offered = [(node.node, node.offer) for node in asked]
        keeps = {one.node for one in await self.hold_all(offered[: len(priced)], at_least, offered[len(priced) :])}
        held = [node for node in asked if node.node in keeps]
        self._chosen = [_price_of(node) for node in held]
        return [*free, *held]

    def _worth_it(self, priced: Sequence[LinkedNode], at_least: int) -> dict[bytes, LinkedNode]:
        """Without such as are dear beside those that have worked for this job before, as far as the others are enough;
        where none of these is there any more, beside the cheapest."""
        paid = {node for term in self.payments.terms for node, one in term.nodes.items() if one.hold}
        known = [_price_of(node) for node in priced if node.node.hex() in paid]
        if paid and priced and not known:
            known = [min(map(_price_of, priced), key=lambda one: one[0] / max(1.0, one[1]))]
        left = dict[bytes, LinkedNode]((node.node, node) for node in priced)
        for node in sorted(priced, key=lambda one: _price_of(one)[0], reverse=True):
            dear = say_dear(*_price_of(node), known) if node.node.hex() not in paid else None
            if dear is not None and len(left) > at_least:
                self._say(f"Without {node.name}: {dear}.")
                del left[node.node]
        return left

    async def open(self, at_least: int) -> set[bytes]:
        taken = await super().open(at_least)
        if taken:
            self._tell_times(len(taken))
        return taken

    def _tell(self, sentence: str) -> None:
        """To whoever watches, and among the run's events: whose job nodes drive sees only these."""
        self._watcher(sentence)
        with contextlib.suppress(StorageError):  # the driver says it, when the folder can be written no more
            self._folder.note(Event(time_s=self._folder.elapsed_s(), sentence=sentence[:1000]))

    def _tell_times(self, places: int) -> None:
        held_ms, set_ms, taken_ms = (round(1000 * one) for one in (self.holding_s, self.opening_s, self.taking_s))
        self._say(
            f"{places} {'place was' if places == 1 else 'places were'} held in {held_ms} ms, the money for that was "
            f"set aside in {set_ms} ms, and taken in {taken_ms} ms."
        )

    async def secure(self, node: LinkedNode) -> None:
        """A node that comes later is held, admitted and taken. Raises NotSecured, NoMoney, and what nodes and the
        ledger do."""
        if is_free(node.offer) or node.node in self._held:
            return
        dear = self._idle.get(node.node) or say_dear(*_price_of(node), self._chosen)
        if dear is not None:
            raise NotSecured(f"{node.name} is not worth its money: {dear}.")
        await self.join(node.node, node.offer)

    # ---- work ----

    def ready(self, node: bytes, samples_per_s: float, tokens_per_sample: int) -> int:
        """A node has measured its speed on the job: gives what a million of its tokens cost from now on."""
        known = self.paid(node)
        if known is None:
            return 0
        self.begin(node)
        earnings = self._earnings.get(node, Earnings()).measured(known.paid_micro, samples_per_s, tokens_per_sample)
        self._earnings[node] = earnings
        return earnings.for_tokens(MICRO, known.micro_per_h)

    async def owes(self, commit: bytes, work: Iterable[tuple[bytes, int, bytes]]) -> None:
        """(node, accepted tokens, id of the Contribution) of a Commit that is about to be written."""
        earned, last = dict[bytes, tuple[int, bytes]](), None
        for node, tokens, contribution in work:
            known, last = self.paid(node), contribution
            if known is None or not tokens:
                continue
            parts, done = self._done.get(node, (0, 0))
            self._done[node] = parts + 1, done + tokens
            earnings = self._earnings[node] = self._earnings.get(node, Earnings()).accepted(tokens)
            most = known.paid_micro + self.left_micro
            earned[node] = earnings.earned_micro(known.micro_per_h, self.ready_ms(node), most), contribution
        if last is not None:  # hosts are paid for a job whose nodes work for nothing, too
            earned |= {driver: (micro, last) for driver, micro in self._for_driving()}
        if earned:
            await self.owe(commit, earned)

    def committed(self) -> None:
        """That Commit is on the disk."""
        before = self.payments.spent_micro
        self.pay_owed()
        self._dearest_micro = max(self._dearest_micro, self.payments.spent_micro - before)

    async def close(self) -> None:
        """A driver that was stopped while it wrote a Commit owes for it where it is written."""
        if self._term is not None and self._term.owed is not None:
            self._term = self._term.settled(await asyncio.to_thread(self._folder.commit_ids))
        await super().close()

    def _for_driving(self) -> Iterator[tuple[bytes, int]]:
        """Hosts, and what each has earned for being there."""
        now_s = self._clock.monotonic()
        passed_s, self._driven_s = now_s - self._driven_s, now_s
        for driver in self._present():
            known = self.paid(driver)
            if known is not None:
                before, seconds = self._driven.get(driver, (known.paid_micro, 0.0))
                self._driven[driver] = before, seconds + passed_s
                yield driver, before + int(known.micro_per_h * (seconds + passed_s) / 3600)

    def idle(self) -> dict[bytes, str]:
        """Nodes at work that are not worth their money any more, and why. They are not taken again."""
        paid = {node: self.paid(node) for node in self._done}
        micro = sum(one.paid_micro for one in paid.values() if one is not None)
        tokens = sum(done for _, done in self._done.values())
        found = dict[bytes, str]()
        for node in self._working & self._done.keys():
            (parts, done), one = self._done[node], paid[node]
            why = say_idle(one.paid_micro, done, parts, micro - one.paid_micro, tokens - done) if one else None
            if why is not None:
                found[node] = why
        self._idle |= found
        return found


def _price_of(node: LinkedNode) -> tuple[int, float]:
    """Of an hour, and FLOP/s."""
    price = node.offer.price
    return price.micro_per_h if price is not None else 0, fastest_float32(node.offer)
