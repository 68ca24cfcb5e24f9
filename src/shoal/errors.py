"""One error tree. Every error a user can cause has a code, a sentence and a thing to do.

    ShoalError                          anything Shoal refuses or cannot do
    ├── BadInput          SH-1xx        what the user or a file said cannot be used
    ├── BadRecord         SH-2xx        bytes from a peer that are malformed, oversized, unsigned or out of place
    ├── LinkError         SH-3xx        a peer that cannot be reached, stalled, or refused
    ├── StorageError      SH-4xx        a disk that is full, bytes that are not what their name says
    ├── EngineError       SH-5xx        the training process failed
    └── JobError          SH-6xx        the job cannot start or go on

Each room defines its own subclasses beside the code that raises them; `docs/errors.md` lists all codes and a test
keeps the list complete.
"""

from __future__ import annotations

from typing import ClassVar


class ShoalError(Exception):
    """A failure that is a sentence: which node or file, what happened, what to do about it."""

    code: ClassVar[str] = "SH-000"

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class BadInput(ShoalError):
    """What a user, a file or a flag said cannot be used."""

    code = "SH-100"


class BadRecord(ShoalError):
    """Bytes from outside are malformed, oversized, wrongly signed, or say something out of place."""

    code = "SH-200"


class LinkError(ShoalError):
    """A peer cannot be reached, stalled, broke the framing, or closed the link."""

    code = "SH-300"


class StorageError(ShoalError):
    """A disk failed or is full, or bytes are not what their name says."""

    code = "SH-400"


class EngineError(ShoalError):
    """The process that computes failed; the agent around it goes on."""

    code = "SH-500"


class JobError(ShoalError):
    """A job cannot start or cannot go on."""

    code = "SH-600"
