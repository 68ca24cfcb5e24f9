"""From token ids to text, piece by piece, as a stream needs it. Pure: the tokenizer comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
CONTEXT = 8
"""Tokens before the new ones that are decoded with them: what a token reads as can depend on the one before."""
CHARACTER_MAX = 4
"""Tokens that a character may take, where each is a byte."""
BYTES_MAX = 16
"""Tokens that may wait for the rest of a character."""


class Decoder:
    """Text of a growing list of tokens. A character that is not whole yet is waited for."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._said = 0
        """How many of the tokens are in text that was given."""

    def add(self, tokens: Sequence[int]) -> str:
        """What can be read now that could not be read before."""
        self._tokens += tokens
        pending = len(self._tokens) - self._said
        for left in range(min(CHARACTER_MAX, pending)):  # what is whole is not held back by what follows it
            text = self._decoded(len(self._tokens) - left)
            if not text.endswith(UNFINISHED):
                return self._give(text, len(self._tokens) - left)
        return "" if pending < BYTES_MAX else self.rest()

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._give(self._decoded(len(self._tokens)), len(self._tokens))

    def _before(self) -> list[int]:
        return self._tokens[max(0, self._said - CONTEXT) : self._said]

    def _decoded(self, stop: int) -> str:
        return self._decode(self._before() + self._tokens[self._said : stop])

    def _give(self, text: str, stop: int) -> str:
        known = len(self._decode(self._before()))
        self._said = stop
        return text[known:]


def spelled(raw: bytes, mark: str = "") -> str:
    """A token's bytes as OpenAI writes them: as text, or where they are a part of a character as `\\xe2\\x80` behind a
    mark."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + escaped(raw)


def escaped(raw: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in raw)


class StopAt:
    """Ends a text before the first of some strings, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What of the text so far may be given out."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
