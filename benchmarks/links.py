"""A shaped network on one machine: hosts in network namespaces, each behind an access link, joined by a switch.

    host "a" ──up──▶ ┌────────┐ ──down──▶ host "b"
    (namespace)      │ switch │           (namespace)
             ◀─down─ └────────┘ ◀──up──

Every host has one TUN interface, `link0`. What the kernel of a host sends there is read by one user-space process, the
switch, which holds every packet back as an access link would: it is serialised at the up rate behind a bounded
first-in-first-out queue (a token bucket one packet deep), travels the sender's delay, is serialised at the receiver's
down rate behind a queue of its own, and travels the receiver's delay. A full queue drops; each traversal may lose a
packet at random, from a seed. Nothing is asked of the kernel but namespaces and TUN, and TCP and UDP are treated alike.

The path between two hosts has the sum of their delays and the smaller of the two rates; `pair` gives the access links
for a wanted round trip. `python benchmarks/links.py` measures with echo packets and TCP transfers what the named links
really give, and prints it beside what was asked.

Congestion control is cubic in every namespace. Bytes are counted by the kernel at the interface, IP header included.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import itertools
import json
import math
import os
import random
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

INTERFACE = "link0"
MTU = 1500
SUBNET = "10.77.0"
HOSTS_MAX = 64
CONGESTION_CONTROL = "cubic"
COALESCE_S = 0.001
"""The switch wakes at most this often, unless it is told otherwise. A packet may be delivered so much too late, never
too early; one packet of full size takes 0.6 ms on a line of 20 Mbit/s."""
READS_MAX = 128
"""Packets taken from one interface before the others get their turn."""

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI, _IFF_UP = 0x0001, 0x1000, 0x1
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922
_libc = ctypes.CDLL(None, use_errno=True)


class CannotMeasure(Exception):
    """This machine cannot carry the measurement; the sentence says why and what to do."""


@dataclass(frozen=True)
class Access:
    """A host's access link. Delays are one way; a rate or delay of 0 means none is imposed."""

    delay_ms: float = 0.0
    up_mbps: float = 0.0
    down_mbps: float = 0.0
    loss: float = 0.0
    """Probability that one traversal, up or down, loses a packet."""
    queue_ms: float = 100.0
    """How much waiting the queue before either direction holds at its rate; what does not fit is dropped."""


@dataclass(frozen=True)
class Link:
    """What two hosts are to see of each other: round trip, rate in each direction, loss in each direction."""

    name: str
    round_trip_ms: float
    mbps: float
    loss: float = 0.0

    def access(self) -> Access:
        """The access link which, on both ends of a path, gives this link."""
        return Access(self.round_trip_ms / 4, self.mbps, self.mbps, 1 - math.sqrt(1 - self.loss))

    def __str__(self) -> str:
        loss = f", {self.loss:.1%} loss" if self.loss else ""
        return f"{self.name} link ({self.round_trip_ms:g} ms round trip, {self.mbps:g} Mbit/s each way{loss})"


LINKS = {
    "home": Link("home", 80, 20),
    "poor": Link("poor", 150, 5, 0.005),
}


# --- namespaces ------------------------------------------------------------------------------------------------------


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise CannotMeasure(f"{what} failed: {os.strerror(code)}. Run this as root, on Linux, outside a sandbox.")


@contextlib.contextmanager
def _inside(namespace: int | None) -> Iterator[int]:
    """The calling thread stands in `namespace` (None: a new one) for the length of the block; gives its descriptor."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if namespace is None:
            _check(_libc.unshare(_CLONE_NEWNET), "Making a network namespace")
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        else:
            _check(_libc.setns(namespace, _CLONE_NEWNET), "Entering a network namespace")
        yield namespace
    finally:
        _check(_libc.setns(home, _CLONE_NEWNET), "Leaving a network namespace")
        os.close(home)


def _ifreq(name: str, rest: bytes) -> bytes:
    return struct.pack("16s24s", name.encode(), rest)


def _address(text: str) -> bytes:
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))


def _open_interface(address: str) -> int:
    """Bring up loopback and the TUN interface of the namespace one stands in; gives the TUN's descriptor."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, _ifreq(INTERFACE, struct.pack("H", _IFF_TUN | _IFF_NO_PI)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, _ifreq("lo", struct.pack("H", _IFF_UP)))
        fcntl.ioctl(control, _SIOCSIFADDR, _ifreq(INTERFACE, _address(address)))
        fcntl.ioctl(control, _SIOCSIFNETMASK, _ifreq(INTERFACE, _address("255.255.255.0")))
        fcntl.ioctl(control, _SIOCSIFMTU, _ifreq(INTERFACE, struct.pack("i", MTU)))
        fcntl.ioctl(control, _SIOCSIFFLAGS, _ifreq(INTERFACE, struct.pack("H", _IFF_UP)))
    return tun


@contextlib.contextmanager
def _allow_congestion_control(algorithm: str) -> Iterator[None]:
    """A namespace may only choose from the machine's list of allowed algorithms: add ours to it for a moment."""
    path = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    before = path.read_text()
    if algorithm in before.split():
        yield
        return
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    if algorithm not in available:
        raise CannotMeasure(f"This kernel has no {algorithm} congestion control (it has {', '.join(available)}).")
    path.write_text(f"{before.strip()} {algorithm}")
    try:
        yield
    finally:
        path.write_text(before)


class Host:
    """A network namespace with one interface behind an access link."""

    def __init__(self, name: str, address: str, access: Access) -> None:
        self.name, self.address, self.access = name, address, access
        with _inside(None) as self.namespace:
            # The namespace of these three is fixed when they are opened, so they can be read from anywhere later.
            Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
            Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1")
            Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text(CONGESTION_CONTROL)
            self.tun = _open_interface(address)
            self._counters: IO[bytes] = Path("/proc/thread-self/net/dev").open("rb", buffering=0)  # noqa: SIM115
            self._diagnosis = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4)

    def counted(self) -> tuple[int, int]:
        """Bytes (received, sent) at the interface so far, as the kernel counts them."""
        self._counters.seek(0)
        for line in self._counters.read().decode().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == INTERFACE:
                fields = numbers.split()
                return int(fields[0]), int(fields[8])
        raise CannotMeasure(f"Host {self.name} has lost its interface: the switch process ended.")

    def congestion_controls(self) -> set[str]:
        """The algorithms of all TCP connections now open here, asked of the kernel (sock_diag(7))."""
        established, congestion = 1 << 1, 4
        body = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 1 << (congestion - 1), 0, established)
        body += bytes(48)
        header = struct.pack("=IHHII", 16 + len(body), 20, 0x301, 1, 0)  # SOCK_DIAG_BY_FAMILY, REQUEST | DUMP
        self._diagnosis.send(header + body)
        found: set[str] = set()
        while True:
            data = self._diagnosis.recv(1 << 16)
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind in (2, 3):  # ERROR, DONE
                    return found
                place = 16 + 72
                while place + 4 <= length:
                    size, attribute = struct.unpack_from("=HH", data, place)
                    if attribute == congestion:
                        found.add(data[place + 4 : place + size].rstrip(b"\0").decode())
                    place += (size + 3) & ~3
                data = data[(length + 3) & ~3 :]

    def popen(self, command: Sequence[str], *, join: Sequence[Path] = (), **options: Any) -> subprocess.Popen[bytes]:
        """Start `command` in this namespace and in the given cgroups; it is killed when the one who started it dies."""
        launcher = [sys.executable, "-I", str(Path(__file__).resolve()), "enter", str(self.namespace), str(os.getpid())]
        for path in join:
            launcher += ["--join", str(path)]
        return subprocess.Popen([*launcher, "--", *command], pass_fds=(self.namespace,), **options)

    def close(self) -> None:
        os.close(self.namespace)
        if self.tun >= 0:
            os.close(self.tun)
        self._counters.close()
        self._diagnosis.close()


def _enter(namespace: int, parent: int, cgroups: Sequence[Path], command: Sequence[str]) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the measuring process ended before this one began")
    _check(_libc.setns(namespace, _CLONE_NEWNET), "Entering a network namespace")
    os.close(namespace)
    for path in cgroups:
        path.write_text(str(os.getpid()))
    os.execvp(command[0], list(command))


# --- the switch ------------------------------------------------------------------------------------------------------


@dataclass
class _Line:
    """One direction of an access link."""

    delay_s: float
    bytes_per_s: float
    loss: float
    queue_s: float
    dice: random.Random
    free_at: float = 0.0
    """When the last byte accepted so far has left the queue."""
    passed: int = 0
    dropped: int = 0
    lost: int = 0

    def arrival(self, at: float, size: int) -> float | None:
        """When a packet offered at `at` comes out at the other end; None if the queue is full or the packet is lost."""
        begin = max(at, self.free_at)
        if begin - at > self.queue_s:
            self.dropped += 1
            return None
        if self.bytes_per_s:
            self.free_at = begin = begin + size / self.bytes_per_s
        if self.loss and self.dice.random() < self.loss:
            self.lost += 1
            return None
        self.passed += 1
        return begin + self.delay_s


@dataclass
class _Port:
    tun: int
    address: bytes
    up: _Line
    down: _Line
    climbing: deque[tuple[float, _Port, bytes]] = field(default_factory=deque)
    """(when it reaches the switch, to whom, packet). Both queues are in the order of time, as a line keeps order, and
    bounded by rate times (queue + delay)."""
    falling: deque[tuple[float, bytes]] = field(default_factory=deque)
    cut: bool = False
    """Nothing gets through, and nobody is told."""


def _switch(specification: str, control: int) -> None:
    """Carry packets between TUN descriptors until `control` is closed; then print what happened, as one JSON object.
    A byte on `control` cuts the host of that number off, or joins it again."""
    given = json.loads(specification)
    coalesce_s = given["coalesce_s"]
    ports = []
    for number, host in enumerate(given["hosts"]):
        access = Access(**host["access"])
        lines = [
            _Line(access.delay_ms / 1e3, mbps * 1e6 / 8, access.loss, access.queue_ms / 1e3,
                  random.Random(f"{given['seed']}/{number}/{way}"))
            for way, mbps in (("up", access.up_mbps), ("down", access.down_mbps))
        ]  # fmt: skip
        ports.append(_Port(host["tun"], socket.inet_aton(host["address"]), lines[0], lines[1]))
    routes = {port.address: port for port in ports}
    by_descriptor = {port.tun: port for port in ports}
    inputs = [control, *by_descriptor]
    # A timely switch is what makes the delays true; it needs little of a core, so let it go first where we may.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    clock = time.monotonic
    late_worst = late_sum = 0.0
    delivered = astray = 0
    last = 0.0
    read, write = os.read, os.write
    while True:
        due = min(
            min((port.climbing[0][0] for port in ports if port.climbing), default=math.inf),
            min((port.falling[0][0] for port in ports if port.falling), default=math.inf),
        )
        ready = select.select(inputs, (), (), None if due == math.inf else max(0.0, due - clock()))[0]
        now = clock()
        if now - last < coalesce_s:
            time.sleep(coalesce_s - (now - last))
            now = clock()
        last = now
        for descriptor in ready:
            if descriptor == control:
                said = read(control, 1)
                if said:
                    ports[said[0]].cut = not ports[said[0]].cut
                    continue
                cpu = time.process_time()
                print(json.dumps({
                    "cpu_s": cpu, "delivered": delivered, "astray": astray, "late_worst_ms": late_worst * 1e3,
                    "late_mean_ms": late_sum / max(1, delivered) * 1e3,
                    "dropped": sum(p.up.dropped + p.down.dropped for p in ports),
                    "lost": sum(p.up.lost + p.down.lost for p in ports),
                }), flush=True)  # fmt: skip
                return
            port = by_descriptor[descriptor]
            line, climbing = port.up, port.climbing
            for _ in range(READS_MAX):
                try:
                    packet = read(descriptor, 2048)
                except BlockingIOError:
                    break
                to = routes.get(packet[16:20])
                if to is None or packet[0] >> 4 != 4:
                    astray += 1
                    continue
                if port.cut or to.cut:
                    continue
                at = line.arrival(now, len(packet))
                if at is not None:
                    climbing.append((at, to, packet))
        while True:  # in the order in which they reach the switch, whoever sent them
            first = min((port for port in ports if port.climbing), key=lambda p: p.climbing[0][0], default=None)
            if first is None or first.climbing[0][0] > now:
                break
            reached, to, packet = first.climbing.popleft()
            at = to.down.arrival(reached, len(packet))
            if at is not None:
                to.falling.append((at, packet))
        for port in ports:
            falling = port.falling
            while falling and falling[0][0] <= now:
                at, packet = falling.popleft()
                write(port.tun, packet)
                late = now - at
                late_sum += late
                late_worst = max(late_worst, late)
                delivered += 1


class Network:
    """Hosts behind access links, from entering the block to leaving it.

    Needs root: raises CannotMeasure, with what is missing, where namespaces or TUN devices may not be made.
    """

    def __init__(self, hosts: Mapping[str, Access], *, seed: int = 0, coalesce_s: float = COALESCE_S) -> None:
        if not 0 < len(hosts) <= HOSTS_MAX:
            raise ValueError(f"a network has 1 to {HOSTS_MAX} hosts, not {len(hosts)}")
        self._asked = dict(hosts)
        self._seed, self._coalesce_s = seed, coalesce_s
        self.hosts: dict[str, Host] = {}
        self.switch_report: dict[str, float] = {}
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Network:
        require_root()
        try:
            with _allow_congestion_control(CONGESTION_CONTROL):
                for number, (name, access) in enumerate(self._asked.items(), 1):
                    self.hosts[name] = Host(name, f"{SUBNET}.{number}", access)
            hosts = list(self.hosts.values())
            given = {
                "seed": self._seed,
                "coalesce_s": self._coalesce_s,
                "hosts": [{"tun": h.tun, "address": h.address, "access": asdict(h.access)} for h in hosts],
            }
            self._switch = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).resolve()), "switch", json.dumps(given)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[h.tun for h in hosts], start_new_session=True,
            )  # fmt: skip
            for host in hosts:  # the switch alone holds the line now: if it dies, so does the interface
                os.close(host.tun)
                host.tun = -1
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def cut(self, name: str) -> None:
        """Let no packet of a host through any more, or all of them again. No end of a connection hears of it."""
        assert self._switch is not None and self._switch.stdin is not None
        self._switch.stdin.write(bytes([list(self.hosts).index(name)]))
        self._switch.stdin.flush()

    @property
    def switch_pid(self) -> int:
        assert self._switch is not None
        return self._switch.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._switch is not None:
            try:
                said, _ = self._switch.communicate(timeout=10)  # closing its standard input ends it
                self.switch_report = json.loads(said) if said.strip() else {}
            except subprocess.TimeoutExpired:
                self._switch.kill()
                self._switch.wait()
        for host in self.hosts.values():
            host.close()
        if self._switch is not None and self._switch.returncode and kind is None:
            raise CannotMeasure(f"The switch process ended with status {self._switch.returncode}; see its error above.")


def require_root() -> None:
    if sys.platform != "linux":
        raise CannotMeasure("Shaped links need Linux (network namespaces and TUN); this is " + sys.platform + ".")
    if os.geteuid() != 0:
        raise CannotMeasure("Shaped links need root, for network namespaces and TUN devices: run this with sudo.")
    if not Path("/dev/net/tun").exists():
        raise CannotMeasure("There is no /dev/net/tun here: load the tun module, or give the container that device.")


# --- what a link really gives ----------------------------------------------------------------------------------------


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def _echo(address: str, count: int) -> None:
    """Round trips of ICMP echo packets of 56 bytes, milliseconds; None for one that did not come back in 2 s."""
    trips: list[float | None] = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.settimeout(2)
        for number in range(count):
            body = struct.pack("!HH", os.getpid() & 0xFFFF, number) + bytes(48)
            begin = time.perf_counter()
            icmp.sendto(struct.pack("!BBH", 8, 0, _checksum(b"\x08\x00\x00\x00" + body)) + body, (address, 0))
            try:
                while True:
                    packet = icmp.recv(2048)
                    if packet[20] == 0 and packet[24:28] == body[:4]:
                        trips.append((time.perf_counter() - begin) * 1e3)
                        break
            except TimeoutError:
                trips.append(None)
            time.sleep(0.02)
    print(json.dumps(trips))


def _send(address: str, seconds: float) -> None:
    with socket.create_connection((address, 5001), timeout=20) as stream:
        end = time.monotonic() + seconds
        piece = os.urandom(1 << 15)
        while time.monotonic() < end:
            stream.sendall(piece)


def _receive(skip_s: float) -> None:
    """Print the rate, bit/s, of one TCP transfer, from `skip_s` seconds after its first byte to its last."""
    with socket.create_server(("0.0.0.0", 5001)) as server:
        print("listening", flush=True)
        stream, _ = server.accept()
        with stream:
            seen: list[tuple[float, int]] = []
            total = 0
            while data := stream.recv(1 << 18):
                total += len(data)
                seen.append((time.monotonic(), total))
    begin = next((entry for entry in seen if entry[0] - seen[0][0] >= skip_s), seen[0])
    print(json.dumps((seen[-1][1] - begin[1]) * 8 / max(1e-9, seen[-1][0] - begin[0])))


@dataclass(frozen=True)
class LinkReport:
    """What a link was asked to give, and gave."""

    link: str
    asked_round_trip_ms: float
    round_trip_ms: float
    round_trip_worst_ms: float
    asked_mbps: float
    tcp_mbps: tuple[float, float]
    """Of one cubic connection, in each direction, one after the other."""
    asked_loss: float
    loss: float
    """Share of all packets of the transfers."""
    congestion_control: str
    switch_core: float
    """Share of a core that the switch took while transferring."""

    def __str__(self) -> str:
        return (
            f"{self.link}: round trip {self.round_trip_ms:.1f} ms (worst {self.round_trip_worst_ms:.1f}) of "
            f"{self.asked_round_trip_ms:g} asked; TCP {self.tcp_mbps[0]:.2f} and {self.tcp_mbps[1]:.2f} of "
            f"{self.asked_mbps:g} Mbit/s; loss {self.loss:.2%} of {self.asked_loss:.2%}; "
            f"{self.congestion_control}; switch {self.switch_core:.1%} of a core"
        )


def measure(link: Link, *, seconds: float = 10.0, echoes: int = 40, seed: int = 1) -> LinkReport:
    """Measure `link` between two hosts: echo packets, then a TCP transfer of `seconds` each way."""
    tool = [sys.executable, "-I", str(Path(__file__).resolve())]
    rates = []
    used: set[str] = set()
    skip = min(3.0, seconds / 3)
    with Network({"a": link.access(), "b": link.access()}, seed=seed) as network:
        hosts = [network.hosts["a"], network.hosts["b"]]
        ends = [*hosts, hosts[0]]
        echo = hosts[0].popen([*tool, "echo", hosts[1].address, str(echoes)], stdout=subprocess.PIPE)
        trips = json.loads(echo.communicate(timeout=60 + 3 * echoes)[0])
        begin = time.monotonic()
        for sender, receiver in itertools.pairwise(ends):
            sink = receiver.popen([*tool, "receive", str(skip)], stdout=subprocess.PIPE)
            assert sink.stdout is not None
            sink.stdout.readline()
            source = sender.popen([*tool, "send", receiver.address, str(seconds)])
            time.sleep(skip)
            used |= sender.congestion_controls()
            source.wait(timeout=120 + seconds)
            rates.append(json.loads(sink.communicate(timeout=120)[0]) / 1e6)
        took = time.monotonic() - begin
    report = network.switch_report
    came = [trip for trip in trips if trip is not None]
    if not came:
        raise CannotMeasure(f"No echo packet came back over the {link.name} link.")
    carried = report["delivered"] + report["lost"]
    return LinkReport(
        link.name, link.round_trip_ms, statistics.median(came), max(came), link.mbps, (rates[0], rates[1]),
        link.loss, report["lost"] / carried, "+".join(sorted(used)), report["cpu_s"] / took,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the shaped links really give.")
    commands = parser.add_subparsers(dest="do")
    enter = commands.add_parser("enter")
    enter.add_argument("namespace", type=int)
    enter.add_argument("parent", type=int)
    enter.add_argument("--join", type=Path, action="append", default=[])
    enter.add_argument("command", nargs="+")
    commands.add_parser("switch").add_argument("specification")
    for name, arguments in (("echo", ("address", "count")), ("send", ("address", "seconds")), ("receive", ("skip",))):
        tool = commands.add_parser(name)
        for argument in arguments:
            tool.add_argument(argument)
    parser.add_argument("--links", default=",".join(LINKS), help="which links, separated by commas (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each TCP transfer (%(default)s)")
    given = parser.parse_args()
    if given.do == "enter":
        _enter(given.namespace, given.parent, given.join, given.command)
    elif given.do == "switch":
        _switch(given.specification, sys.stdin.fileno())
    elif given.do == "echo":
        _echo(given.address, int(given.count))
    elif given.do == "send":
        _send(given.address, float(given.seconds))
    elif given.do == "receive":
        _receive(float(given.skip))
    else:
        try:
            for name in given.links.split(","):
                if name not in LINKS:
                    raise CannotMeasure(f"There is no link called {name!r}; there are {', '.join(LINKS)}.")
                print(measure(LINKS[name], seconds=given.seconds), flush=True)
        except CannotMeasure as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
