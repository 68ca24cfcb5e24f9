"""Engines are forked from a process that has loaded torch and transformers already: one then starts in milliseconds
instead of seconds, and the memory of the libraries is taken once.

`fork_engine` is the agent's side; `python -m shoal.engines.template PARENT_PID` is the process, of which an agent has
one, from its first engine on. It gets a `Start` with four sockets for each engine: what shall be its stdin, stdout and
stderr, and one for its process id followed, when it has ended, by how. The template computes nothing and starts no
thread, which makes forking it safe; macOS does not allow it, so there each engine is started afresh.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import importlib
import os
import random
import selectors
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

import msgspec

from shoal.engines.lifetime import die_with_parent

CAN_FORK = sys.platform.startswith("linux")
START_MAX_BYTES = 64 * 1024
SOCKETS = 4
STATUS = struct.Struct("<i")
LOADED = ("transformers.modeling_utils", "transformers.models.llama.modeling_llama")
"""What every language model needs, and the architecture of the presets; others are loaded by the engine itself."""
WORKERS = ("shoal.training.worker",)
"""Loaded too: the engines that an agent starts most."""

MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Huge pages where the system grants them: how activations happen to lie in ordinary ones makes up to a tenth of the
time of a step. Read when a process begins; what the user has set goes before."""


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fork an engine with these environment variables beside the template's own."""

    worker: str
    """The module whose `work` the engine runs."""
    environment: dict[str, str]


_Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _UntilEnd(asyncio.StreamReaderProtocol):
    """A stream that closes itself when the other side has ended."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def _streams(ours: socket.socket, limit: int) -> _Streams:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit)
    transport, protocol = await loop.create_unix_connection(lambda: _UntilEnd(reader), sock=ours)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class ForkedProcess:
    """An engine's process, with what is used of `asyncio.subprocess.Process`."""

    def __init__(
        self, template: _Template, pid: int, commands: _Streams, replies: _Streams, errors: _Streams, status: _Streams
    ) -> None:
        self._template = template
        self.pid = pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = commands[1], replies[0], errors[0]
        self._open = (commands, replies, errors, status)  # a stream that nobody holds is closed
        self._ended = asyncio.create_task(self._end(status[0]))

    async def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    async def _end(self, status: asyncio.StreamReader) -> int:
        try:
            (self.returncode,) = STATUS.unpack(await status.readexactly(STATUS.size))
        except (asyncio.IncompleteReadError, ConnectionError):  # the template was killed, and its engines with it
            self.returncode = -signal.SIGKILL
            warm(gone=self._template)
        return self.returncode


class _Template:
    """The agent's template process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One thread, and no look at a GPU that would keep the forked ones from using it.
        careful = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shoal.engines.template", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**MEMORY, **os.environ, **careful},
            )

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def start(self, start: Start, sockets: list[socket.socket]) -> None:
        """Hand `sockets` to a new engine: they are closed here, so that they are the engine's alone."""
        try:
            socket.send_fds(self._control, [msgspec.msgpack.encode(start)], [each.fileno() for each in sockets])
        finally:
            for each in sockets:
                each.close()

    def close(self) -> None:
        self._control.close()
        self._process.kill()  # it may still be loading, and its engines end with it
        self._process.wait()


_template: _Template | None = None


def warm(gone: _Template | None = None) -> None:
    """Have the template load its libraries now, so that the first engine does not wait for them; another one in place
    of one that is `gone`."""
    global _template
    if CAN_FORK and (_template is None or _template is gone or not _template.lives):
        if _template is not None:
            _template.close()
            atexit.unregister(_template.close)
        _template = _Template()
        atexit.register(_template.close)


async def fork_engine(worker: str, environment: Mapping[str, str], stream_limit: int) -> ForkedProcess | None:
    """Fork an engine; None where that cannot be: the system does not allow it, or the template ended
    (an engine that is started afresh then says why). `stream_limit` bounds what is buffered of each of its streams."""
    warm()
    template = _template
    if template is None:
        return None
    pairs = [socket.socketpair() for _ in range(SOCKETS)]
    try:
        template.start(Start(worker, dict(environment)), [theirs for _, theirs in pairs])
        commands, replies, errors, status = [await _streams(ours, stream_limit) for ours, _ in pairs]
        (pid,) = STATUS.unpack(await status[0].readexactly(STATUS.size))
    except (OSError, asyncio.IncompleteReadError):
        return None
    return ForkedProcess(template, pid, commands, replies, errors, status)


# --- the process itself ---------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Fork engines until the agent closes `control`."""
    woken, wakes = socket.socketpair()
    for end in (woken, wakes):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for each in (control, woken):
            selector.register(each, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is woken:
                    woken.recv(4096)
                    _report_ended(running)
                    continue
                message, descriptors, _, _ = socket.recv_fds(control, START_MAX_BYTES, SOCKETS)
                if not message:
                    return
                *streams, status = (socket.socket(fileno=descriptor) for descriptor in descriptors)
                template, pid = os.getpid(), os.fork()
                if pid == 0:
                    selector.close()
                    _keep_only(streams, (control, woken, wakes, status, *running.values()))
                    _be_engine(msgspec.msgpack.decode(message, type=Start), template)
                running[pid] = status
                for each in streams:
                    each.close()
                _tell(status, pid)


def _keep_only(streams: Sequence[socket.socket], others: Sequence[socket.socket]) -> None:
    """In the forked process: `streams` become stdin, stdout and stderr, and nothing of the template is left."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    for each in (*streams, *others):
        each.close()


def _report_ended(running: dict[int, socket.socket]) -> None:
    while running:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as status:
            _tell(status, os.waitstatus_to_exitcode(ended))


def _tell(status: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        status.send(STATUS.pack(number))


def _be_engine(start: Start, template: int) -> NoReturn:
    """In the forked process: be what `python -m WORKER` would be."""
    code = 1
    try:
        os.environ.update(start.environment)
        random.seed()
        importlib.import_module(start.worker).work(template)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:  # noqa: BLE001 - what a process does with an error that nobody handled
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    gc.disable()  # what is loaded stays, and looking for garbage in it again and again takes a fifth of the time
    for module in (*LOADED, *WORKERS):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in an engine would copy every page that it shares
    gc.enable()
    serve(socket.socket(fileno=os.dup(0)))


if __name__ == "__main__":
    main()
