"""Guessing tokens, so that one crossing of the ring may bring several. Pure.

A guess is checked by the stages as if its tokens had been chosen, and what the model would have chosen instead is taken
from the first difference on. Since a token is a function of logits, seed and position alone (`sampling`), a stream with
guesses is the very stream without, and its distribution with it (Leviathan et al., 2023, without their random
acceptance). Prompt look-up: what followed the last time when the text ended the same way (Saxena, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST = 4
"""Tokens at the end of a text that are looked for earlier in it, at most."""
SHORTEST = 2
GUESS_MAX = 16
LOOK_BACK = 8192


def look_up(tokens: Sequence[int], most: int = GUESS_MAX) -> tuple[int, ...]:
    """What followed the latest earlier place at which the text ended as it ends now; the longer ending counts."""
    text = tokens[-LOOK_BACK:]
    longest, after = SHORTEST - 1, len(text)
    for end in range(len(text) - 2, -1, -1):  # a stream does this for every token: one look at each place
        if text[end] != text[-1]:
            continue
        alike = 1
        while alike < min(LONGEST, end + 1) and text[end - alike] == text[-1 - alike]:
            alike += 1
        if alike > longest:
            longest, after = alike, end + 1
            if alike == LONGEST:
                break
    return tuple(text[after : after + most])


@dataclass(frozen=True, slots=True)
class Guessing:
    """How well guesses did lately, and how long they may therefore be."""

    right: float = 0.5
    """Share of guessed tokens that were right, a moving average."""

    def checked(self, guessed: int, right: int) -> Guessing:
        """After a guess of `guessed` tokens of which the first `right` held."""
        if guessed < 1:
            return self
        tried = min(guessed, right + 1)  # those behind the first wrong one say nothing
        weight = 1 - 0.9**tried
        return Guessing(self.right + weight * (right / tried - self.right))

    def length(self, *, ring_ms: float, position_ms: float) -> int:
        """How many tokens to guess: each one more is worth it while the chance that it and all before it hold, times a
        ring's time that it saves, is more than its computing."""
        if not 0 < self.right < 1:
            return GUESS_MAX if self.right >= 1 else 1
        count, chance = 0, 1.0
        while count < GUESS_MAX:
            chance *= self.right
            if chance * ring_ms <= position_ms:
                break
            count += 1
        return count


def held(guess: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the guessed tokens are what the model chose. `chosen[i]`: its token at the place of `guess[i]`."""
    for at, (guessed, token) in enumerate(zip(guess, chosen, strict=False)):
        if guessed != token:
            return at
    return min(len(guess), len(chosen))
