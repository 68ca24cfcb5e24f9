"""examples/digits.py as a process that lies: one sample of the first batch of every round is another than it was
given. Everything else is done as asked."""

import runpy
import sys
from collections.abc import Iterator
from typing import Any

import shoal

join = shoal.join


class Liar:
    def __init__(self, member: Any, samples: int) -> None:
        self._member, self._samples = member, samples

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)

    def __iter__(self) -> Iterator[Any]:
        seen = -1
        for batch in self._member:
            if self._member.round != seen:
                seen = self._member.round
                batch[0] = (batch[0] + 1) % self._samples
            yield batch


shoal.join = lambda *given, samples, **options: Liar(join(*given, samples=samples, **options), samples)
runpy.run_path(sys.argv[1], run_name="__main__")
