"""An engine as a child process, seen from the agent: commands go in, replies come out, and when it dies the agent lives
and is told why."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar

import msgspec

from shoal.engines.messages import FRAME, FRAME_MAX_BYTES, Done, Failed, Stop
from shoal.engines.template import MEMORY, fork_engine
from shoal.errors import EngineError

OUTSTANDING_MAX = 64
"""Commands that are unanswered; others wait their turn."""
STREAM_LIMIT = FRAME_MAX_BYTES + FRAME.size
LOG_LINES_KEPT = 20
LOG_LINE_MAX = 2_000
STOP_WAIT_S = 5.0


class EngineDied(EngineError):
    """The child process is gone: killed, crashed or out of memory."""

    code = "SH-520"


class EngineFailed(EngineError):
    """The engine refused a command or could not do it; it goes on. `cause_code` is the code of its own error."""

    code = "SH-521"

    def __init__(self, sentence: str, cause_code: str) -> None:
        super().__init__(sentence)
        self.cause_code = cause_code


R = TypeVar("R")
_encoder = msgspec.msgpack.Encoder()


class Asked(msgspec.Struct, frozen=True):
    number: int
    command: Any


class Answered(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def reply(self) -> Any: ...


class ChildProcess(Protocol):
    """What is used of `asyncio.subprocess.Process`."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    @property
    def stdin(self) -> asyncio.StreamWriter | None: ...
    @property
    def stdout(self) -> asyncio.StreamReader | None: ...
    @property
    def stderr(self) -> asyncio.StreamReader | None: ...
    async def wait(self) -> int: ...
    def kill(self) -> None: ...


class ChildEngine:
    """One child process. All methods raise EngineDied and EngineFailed; several may be waited for at once. Made by
    `start`, ended by `stop` or `kill`. Each kind of engine is a subclass with methods for its commands."""

    ANSWERED: ClassVar[type]
    """What comes back in a frame: a strict type with `number` and `reply`."""
    WORKER: ClassVar[str]
    """The module that is the engine: `python -m WORKER PARENT_PID`, with a function `work(parent)` for one forked."""

    def __init__(self, name: str, process: ChildProcess, log: Callable[[str], None] | None) -> None:
        self._name, self._process, self._log = name, process, log
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(self.ANSWERED)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._turns = asyncio.Semaphore(OUTSTANDING_MAX)
        self._ending = False
        self._last_lines: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self._died: asyncio.Future[EngineDied] = asyncio.get_running_loop().create_future()
        self._stderr = asyncio.create_task(self._read_log())
        self._replies = asyncio.create_task(self._read_replies())

    @classmethod
    async def start(
        cls,
        name: str,
        *,
        threads: int = 1,
        log: Callable[[str], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> Self:
        """Start the engine: forked from the template where that is possible, else `spawn`. `name` is who it computes
        for, for sentences; `log` is given each line that it writes to stderr. Another `command` (module and arguments)
        speaks the same way over its pipes."""
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS is not deterministic
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "",
        }
        environment = {key: value for key, value in environment.items() if value}
        process = await fork_engine(cls.WORKER, environment, STREAM_LIMIT) if command is None else None
        if process is not None:
            return cls(name, process, log)
        return await cls.spawn(name, {**MEMORY, **os.environ, **environment}, log=log, command=command)

    @classmethod
    async def spawn(
        cls,
        name: str,
        environment: Mapping[str, str],
        *,
        log: Callable[[str], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> Self:
        """Start it afresh, `python -m WORKER PARENT_PID`, with these environment variables and no others. Raises
        OSError."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *(command or (cls.WORKER,)),
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            limit=STREAM_LIMIT,
        )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def died(self) -> asyncio.Future[EngineDied]:
        """Done when the process has ended without being told to."""
        return self._died

    async def stop(self) -> None:
        """Ask it to exit; kill it when it does not within STOP_WAIT_S."""
        self._ending = True
        with contextlib.suppress(TimeoutError, EngineDied, EngineFailed):
            async with asyncio.timeout(STOP_WAIT_S):
                await self._ask(Stop(), Done)
                await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """End it now."""
        self._ending = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        await asyncio.gather(self._replies, self._stderr)

    # --- the pipe --------------------------------------------------------------------------------------------------

    async def _ask(self, command: msgspec.Struct, expected: type[R]) -> R:
        return self._expect(await self._reply_to(command), expected)

    def _expect(self, reply: Any, expected: type[R]) -> R:
        if isinstance(reply, Failed):
            raise EngineFailed(reply.sentence, reply.code)
        if not isinstance(reply, expected):
            raise EngineFailed(f"The engine of {self._name} answered {type(reply).__name__}.", "SH-521")
        return reply

    async def _reply_to(self, command: msgspec.Struct) -> Any:
        async with self._turns:
            return await self._replied(command)

    async def _replied(self, command: msgspec.Struct) -> Any:
        if self._replies.done():
            raise await self._cause_of_death()
        self._number += 1
        number = self._number
        body = _encoder.encode(Asked(number, command))
        if len(body) > FRAME_MAX_BYTES:
            raise EngineFailed(f"A {type(command).__name__} of {len(body)} bytes is too long.", "SH-521")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        stdin = self._process.stdin
        assert stdin is not None
        try:
            with contextlib.suppress(ConnectionError):  # it died: the future then says how
                if not stdin.is_closing():  # the fast loop refuses to write to what is closed with an error of its own
                    stdin.write(FRAME.pack(len(body)) + body)
                    await stdin.drain()
            return await future
        finally:
            self._waiting.pop(number, None)

    async def _read_replies(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            while True:
                (length,) = FRAME.unpack(await stdout.readexactly(FRAME.size))
                if length > FRAME_MAX_BYTES:
                    break
                answered: Answered = self._decoder.decode(await stdout.readexactly(length))
                future = self._waiting.get(answered.number)
                if future is not None and not future.done():
                    future.set_result(answered.reply)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            pass
        if self._process.returncode is None and not self._ending:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_WAIT_S):
                    await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
        error = await self._cause_of_death()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        if not self._ending and not self._died.done():
            self._died.set_result(error)

    async def _read_log(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        while True:
            try:
                line = await stderr.readline()
            except ValueError:  # a line longer than the stream's limit
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()[:LOG_LINE_MAX]
            self._last_lines.append(text)
            if self._log is not None:
                self._log(text)

    async def _cause_of_death(self) -> EngineDied:
        code = await self._process.wait()
        await self._stderr
        last = next((line for line in reversed(self._last_lines) if line.strip()), "")
        if code == -signal.SIGKILL:
            how = "was killed (SIGKILL); unless somebody did that by hand, this machine ran out of memory"
        elif code == -signal.SIGXCPU:
            how = "took more processor time than it may"
        elif code < 0:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        elif "MemoryError" in last or "can't allocate memory" in last:
            how = f"ran out of memory: {last}"
        elif self._ending:
            how = "was told to end"
        else:
            how = f"ended with code {code}" + (f": {last}" if last else "")
        return EngineDied(f"The engine of {self._name} (process {self.pid}) {how}.")
