"""From text that comes in pieces to tokens that read as that very text. Pure: the tokenizer comes in.

A replica that says text alone is known by the gateway's own tokens all the same, so that the stream can go on anywhere.
A piece encoded by itself may read otherwise where it stands: some tokenizers put a space before a text's beginning. So
each piece is checked by reading it back, and one that does not read as it should waits for the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.gateway.text import CONTEXT, UNFINISHED
from shoal.models.tokenizers import BadTokenizer, TextTokenizer

WAITING_MAX = 512
"""Characters that wait to be read as they should."""
ANCHORS = ("\n", "a")
"""What a piece is encoded behind, where by itself it reads otherwise."""


class Unwritable(Exception):
    """No tokens of this tokenizer read as the text."""


class Encoder:
    """Tokens of a growing text that follows `before`."""

    def __init__(self, tokenizer: TextTokenizer, before: Sequence[int]) -> None:
        """Raises Unwritable where `before` ends within a character."""
        self._tokenizer = tokenizer
        self._before = list(before[-CONTEXT:])
        self._waiting = ""
        if self._tokenizer.decode(self._before).endswith(UNFINISHED):
            raise Unwritable("the text so far ends within a character")

    def add(self, text: str, *, last: bool = False) -> tuple[int, ...]:
        """Tokens of what is new, or none as long as it waits. Raises Unwritable."""
        self._waiting += text
        if not self._waiting:
            return ()
        known = self._tokenizer.decode(self._before)
        for tokens in self._written(self._waiting):
            if self._tokenizer.decode([*self._before, *tokens]) == known + self._waiting:
                self._before, self._waiting = [*self._before, *tokens][-CONTEXT:], ""
                return tuple(tokens)
        if last or len(self._waiting) > WAITING_MAX:
            raise Unwritable(f"the model's tokenizer cannot write {self._waiting[:40]!r} where it stands")
        return ()

    def _written(self, text: str) -> list[list[int]]:
        found = []
        for anchor in ("", *ANCHORS):
            try:
                behind = self._tokenizer.encode(anchor).tolist() if anchor else []
                whole = self._tokenizer.encode(anchor + text).tolist()
            except BadTokenizer:
                continue
            if whole[: len(behind)] == behind:
                found.append(whole[len(behind) :])
        return found
