"""What a command may end with that an engine answers, and goes on. For engines alone: it loads torch."""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.engines.messages import SENTENCE_MAX, Failed
from shoal.errors import EngineError, ShoalError

FAILURES = (ShoalError, OSError, torch.OutOfMemoryError)


class OutOfDeviceMemory(EngineError):
    """The model and its batches do not fit on the device."""

    code = "SH-536"


class FileTrouble(EngineError):
    """A file that a command names could not be read or written."""

    code = "SH-537"


def failed(error: Exception) -> Failed:
    """The answer to a command that ended with one of FAILURES."""
    if isinstance(error, torch.OutOfMemoryError):
        error = OutOfDeviceMemory(f"The device ran out of memory; lower batch_samples or use a smaller model. {error}")
    elif not isinstance(error, ShoalError):
        error = FileTrouble(f"A file could not be read or written: {_without_folders(error)}.")
    return Failed(code=error.code, sentence=error.sentence[:SENTENCE_MAX])


def _without_folders(error: Exception) -> str:
    """What the system says, with the file's name but not where it lies: a driver reads it, too."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({Path(error.filename).name})" if error.filename else error.strerror
    return str(error)
