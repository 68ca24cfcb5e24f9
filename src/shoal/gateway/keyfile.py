"""The file of API keys, read again when it has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal.gateway.keys import ApiKey, BadKeys, Keys, parse_keys
from shoal.world import Clock

FILE_MAX_BYTES = 1 << 20
LOOK_EVERY_S = 1.0


class KeyFile:
    """Looked at when keys are asked for, at most once a second. One that cannot be used any more changes nothing."""

    def __init__(self, path: Path, clock: Clock, say: Callable[[str], None]) -> None:
        """Raises BadKeys."""
        self._path, self._clock, self._say = path, clock, say
        self._looked = clock.monotonic()
        self._seen = _state(path)
        self._keys = Keys.of(_read(path), self._looked)

    def __call__(self) -> Keys:
        now = self._clock.monotonic()
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            state = _state(self._path)
            if state != self._seen:
                self._seen = state
                try:
                    self._keys.replace(_read(self._path), now)
                    self._say(f"{self._path} was read again: {len(self._keys.accounts)} keys.")
                except BadKeys as error:
                    self._say(f"The keys stay as they were: {error.sentence}")
        return self._keys


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        with path.open("rb") as file:
            text = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise BadKeys(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) > FILE_MAX_BYTES:
        raise BadKeys(f"{path} is larger than {FILE_MAX_BYTES} bytes.")
    return parse_keys(text.decode(errors="replace").splitlines(), str(path))
