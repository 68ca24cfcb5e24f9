"""What a session had of a stage. Node and gateway count it by this one rule, from the same pieces of work. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Served:
    """Counted as pieces come. A guess counts as generated when a later piece shows that it held; of the last piece,
    guesses do not count."""

    prompt: int = 0
    """Positions of the prompt, each once."""
    generated: int = 0
    computed: int = 0
    """All positions, guesses and repeats included."""
    _begun: int | None = None

    @staticmethod
    def continued(positions: int, generated: int, prompt_tokens: int) -> Served:
        """What a replica that goes on by itself did, when so many tokens followed on so many positions."""
        served = Served()
        if generated:
            served.add(0, positions, 1, prompt_tokens)
        if generated > 1:
            served.add(positions, generated - 1, 1, prompt_tokens)
        return served

    def add(self, start: int, positions: int, choose: int, prompt_tokens: int) -> None:
        """A piece: `positions` from `start` on, of which the tokens after the last `choose` were wanted; the session's
        prompt has `prompt_tokens`."""
        self.computed += positions
        self.prompt = max(self.prompt, min(start + positions, prompt_tokens))
        if choose:
            certain = start + positions - choose + 1
            self._begun = certain if self._begun is None else self._begun
            self.generated = max(self.generated, certain - self._begun + 1)
