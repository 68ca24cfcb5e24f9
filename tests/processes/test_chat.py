"""`shoal chat` as people meet it: the command, at a terminal and in pipes, against a server process."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import environment, running, shoal
from test_stages import a_checkpoint

from shoal.models.tokenizers import ByteTokenizer

LIMIT_S = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_checkpoint(tmp_path_factory.mktemp("served") / "tiny", "llama", vocab_size=257, eos_token_id=256)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "home").mkdir()
    return folder


@contextlib.contextmanager
def a_server(place: Path, checkpoint: Path, *more: str) -> Iterator[str]:
    with a_server_process(place, checkpoint, *more) as ready:
        yield ready["url"]


@contextlib.contextmanager
def a_server_process(place: Path, checkpoint: Path, *more: str) -> Iterator[dict[str, Any]]:
    words = ["serve", str(checkpoint), "--here", "--threads", "1", "--http", "127.0.0.1:0", "--json", *more]
    with subprocess.Popen(
        [sys.executable, "-m", "shoal", *words], env=environment(place), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def url(place: Path, checkpoint: Path) -> Iterator[str]:
    with a_server(place, checkpoint) as found:
        yield found


def chat(place: Path, *words: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", "chat", *words], env=environment(place, **more), input=stdin,
        capture_output=True, text=True, timeout=LIMIT_S, errors="replace",
    )  # fmt: skip


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_question_is_asked_once_from_the_command_line_or_a_pipe(place: Path, url: str) -> None:
    settings = ["--url", url, "--temperature", "0", "--max-tokens", "12"]
    said = answer(chat(place, "tiny", "hello", *settings, "--json"))
    assert (said["question"], said["model"], said["finish"]) == ("hello", "tiny", "length")
    assert said["text"] and said["usage"]["completion_tokens"] == 12
    piped = answer(chat(place, *settings, "--json", stdin="hello\n"))
    assert piped["text"] == said["text"], "the only model that is served, and the question from the pipe"
    plain = chat(place, "tiny", "hello", *settings)
    assert plain.returncode == 0 and plain.stdout and "\x1b" not in plain.stdout
    drawn = [chat(place, "tiny", "hello", "--url", url, "--max-tokens", "12", "--seed", n, "--json") for n in "112"]
    texts = [answer(one)["text"] for one in drawn]
    assert texts[0] == texts[1] != texts[2]
    told = answer(chat(place, "tiny", "hello", *settings, "--system", "Be brief.", "--json"))
    assert told["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"] + len("system: Be brief.\n")


@pytest.mark.parametrize(
    ("words", "stdin", "status", "code", "part"),
    [
        (["other", "hi"], "", 2, "SH-103", "other is neither a directory nor served at"),
        (["tiny", "hi", "--temperature", "3"], "", 2, "SH-103", "from 0 to 2"),
        (["tiny", "hi", "--max-tokens", "0"], "", 2, "SH-103", "at least one"),
        (["tiny"], "", 2, "SH-103", "standard input is empty"),
        (["tiny", "x" * 600], "", 2, "SH-185", "context is 512 tokens, and the prompt has"),
        (["tiny", "hi", "--key-file", "gone"], "", 2, "SH-103", "gone cannot be read"),
        (["tiny", "hi", "--url", "http://127.0.0.1:9/v1"], "", 1, "SH-345", "Nobody serves at http://127.0.0.1:9/v1"),
        (["tiny", "hi", "--url", "nonsense"], "", 2, "SH-185", "no URL of an endpoint"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    place: Path, url: str, words: list[str], stdin: str, status: int, code: str, part: str
) -> None:
    done = chat(place, "--url", url, *words, "--json", stdin=stdin)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (status, code) and part in error["sentence"], error
    assert "Traceback" not in done.stderr


def test_a_key_is_sent_and_what_its_limits_say_is_passed_on(place: Path, checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret requests=1\n")
    with a_server(place, checkpoint, "--api-keys", str(keys)) as url:
        ask = ["tiny", "hi", "--url", url, "--max-tokens", "3"]
        done = chat(place, *ask)
        assert done.returncode == 2 and "does not take the key" in done.stderr and "SHOAL_API_KEY" in done.stderr
        assert chat(place, *ask, SHOAL_API_KEY="wrong").returncode == 2
        assert chat(place, *ask, "--key-file", str(keys)).returncode == 0
        done = chat(place, *ask, SHOAL_API_KEY="secret")
        assert done.returncode == 1 and done.stderr.startswith("error SH-346")
        assert "1 requests a minute" in done.stderr and "try again in " in done.stderr


class Terminal:
    """A process whose terminal this is."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell inherits that it is ignored
            os.execve(sys.executable, [sys.executable, "-m", "shoal", *words], environment)
        self.seen = ""

    def until(self, part: str, patience_s: float = LIMIT_S) -> str:
        """What was shown until `part` was, which is taken out of what is still to be seen."""
        while part not in self.seen:
            ready, _, _ = select.select([self._end], [], [], patience_s)
            assert ready, f"{part!r} was not shown: {self.seen!r}"
            try:
                self.seen += os.read(self._end, 65536).decode(errors="replace")
            except OSError:  # its other side was closed
                raise AssertionError(f"{part!r} was not shown: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(part)
        return before

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def begin_answer(self) -> None:
        """Ask, and wait for its first word."""
        self.type("hello\n")
        self.until("hello\r\n")
        while not self.seen:
            self.seen += os.read(self._end, 1).decode(errors="replace")

    def press_ctrl_c(self, shown: str) -> None:
        """Until it was taken: readline overlooks a signal between its prompt and its first wait."""
        for _ in range(30):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.until(shown, patience_s=2)
                return
        raise AssertionError(f"Ctrl-C did nothing: {self.seen!r}")

    def ended(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self._end, 65536):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._end)


@contextlib.contextmanager
def a_terminal(place: Path, *words: str) -> Iterator[Terminal]:
    terminal = Terminal(["chat", *words], environment(place, TERM="dumb"))
    try:
        yield terminal
    finally:
        terminal.close()


def test_a_conversation(place: Path, url: str) -> None:
    with a_terminal(place, "tiny", "--url", url, "--temperature", "0", "--max-tokens", "60") as terminal:
        assert "tiny at http://" in terminal.until("> ")
        terminal.press_ctrl_c(shown="Ctrl-D ends")  # at the prompt it ends nothing
        terminal.until("> ")
        terminal.type("/wish\n")
        terminal.until("put a space before it")
        terminal.until("> ")
        terminal.type("/system Be brief.\n")
        terminal.until("from the next question on")
        terminal.until("> ")
        for _ in range(2):
            terminal.type("hello\n")
            terminal.until("hello")
            assert terminal.until("--max-tokens was reached").strip()
            terminal.until("> ")
        forgotten = ""
        for _ in range(4):  # 60 tokens each, and as many for the question: 512 are soon full
            terminal.type("y" * 60 + "\n")
            terminal.until("y" * 60)
            terminal.until("--max-tokens was reached")
            forgotten += terminal.until("> ")
        assert "oldest turn(s) are forgotten" in forgotten
        terminal.type("/reset\n")
        terminal.until("Begun anew")
        terminal.until("> ")
        terminal.type("z" * 600 + "\n")
        terminal.until("error SH-185")
        terminal.until("> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.ended() == 0


def test_ctrl_c_ends_an_answer_and_not_the_program(place: Path, tmp_path: Path) -> None:
    long = a_checkpoint(tmp_path / "long", "llama", vocab_size=257, eos_token_id=256, max_position_embeddings=1 << 18)
    ByteTokenizer().save(long)  # its answer would take hours
    with (
        a_server_process(place, long) as server,
        a_terminal(place, "long", "--url", server["url"], "--temperature", "0") as terminal,
    ):
        terminal.until("> ")
        terminal.begin_answer()
        terminal.type("\x03")
        terminal.until("Ended by you")
        terminal.until("> ")
        terminal.begin_answer()
        os.kill(server["pid"], signal.SIGKILL)  # whoever serves may go; the program stays
        terminal.until("error SH-347")
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("error SH-34")  # nobody serves; or the system has not yet closed all of it
        terminal.until("> ")
        terminal.type("/exit\n")
        assert terminal.ended() == 0


def test_a_directory_is_served_for_as_long_as_the_conversation(place: Path, checkpoint: Path, url: str) -> None:
    settings = ["--temperature", "0", "--max-tokens", "12", "--json"]
    said = answer(chat(place, str(checkpoint), "hello", "--here", *settings))
    assert said["text"] == answer(chat(place, "tiny", "hello", "--url", url, *settings))["text"]
    assert said["model"] == "tiny"
    nothing = place / "nothing"
    nothing.mkdir()
    done = chat(place, str(nothing), "hello", "--here")
    assert done.returncode == 1 and "neither a checkpoint directory" in done.stderr and "Traceback" not in done.stderr


def test_a_directory_is_served_on_nodes_where_there_are_some(tmp_path: Path, checkpoint: Path, url: str) -> None:
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    settings = ["--temperature", "0", "--max-tokens", "12", "--json"]
    with running(tmp_path, "up", "--nodes", "1") as (_, ready):
        said = answer(chat(tmp_path, str(checkpoint), "hello", *settings))
        assert said["text"] == answer(chat(tmp_path, "tiny", "hello", "--url", url, *settings))["text"]
        (account,) = json.loads(shoal(tmp_path, "receipts", "--json").stdout)["nodes"]
        assert account["node"] == ready["nodes"][0]["node"] and account["sessions"] == 1
        assert account["prompt_tokens"] == said["usage"]["prompt_tokens"]
