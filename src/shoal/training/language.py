"""A causal language model at work: mean loss over token sequences, and text continued."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BFLOAT16 = "bfloat16"


class CausalLanguage:
    """A module that maps token ids to logits, with the dtype its matrix products are done in."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: str) -> None:
        self.model: Any = model
        self.device = device
        self._autocast = dtype == BFLOAT16

    def loss(self, tokens: torch.Tensor, of_tokens: int) -> torch.Tensor:
        """Summed cross-entropy in nats of int64 [batch, T + 1] tokens, each predicted from those before it, over
        `of_tokens`: the mean, when that is batch * T."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        flat = logits.float().view(-1, logits.shape[-1])
        return F.cross_entropy(flat, tokens[:, 1:].reshape(-1), reduction="sum") / of_tokens

    @torch.no_grad()
    def generate(
        self, prompt: list[int], count: int, *, temperature: float, seed: int, end: int | None, positions: int | None
    ) -> list[int]:
        """Continue `prompt` (not empty) by at most `count` ids, until `end`. The likeliest id at temperature 0, else
        one drawn on the host with `seed`. With `positions`, only so many last ids are looked at."""
        generator = torch.Generator().manual_seed(seed)
        ids, cache = list(prompt), None
        self.model.eval()
        try:
            while len(ids) - len(prompt) < count:
                if positions is not None and len(ids) > positions:
                    cache = None
                window = ids[-1:] if cache is not None else ids[-positions:] if positions else ids
                outputs = self.model(
                    input_ids=torch.tensor([window], device=self.device), past_key_values=cache, use_cache=True
                )
                cache = outputs.past_key_values
                logits = outputs.logits[0, -1].float().cpu()
                if temperature > 0:
                    chances = torch.softmax(logits / temperature, dim=-1)
                    token = int(torch.multinomial(chances, 1, generator=generator))
                else:
                    token = int(logits.argmax())
                if token == end:
                    break
                ids.append(token)
        finally:
            self.model.train()
        return ids[len(prompt) :]
