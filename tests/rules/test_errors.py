"""Every error has a code of its own, in its base's hundred, and a line in docs/errors.md."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import shoal
from shoal.errors import BadInput, BadRecord, EngineError, JobError, LinkError, ShoalError, StorageError

ROOT = Path(__file__).parents[2]
HUNDREDS: dict[type[ShoalError], str] = {
    BadInput: "SH-1",
    BadRecord: "SH-2",
    LinkError: "SH-3",
    StorageError: "SH-4",
    EngineError: "SH-5",
    JobError: "SH-6",
}


@cache
def all_errors() -> tuple[type[ShoalError], ...]:
    """Every error class of the package, whichever module defines it."""
    for module in pkgutil.walk_packages(shoal.__path__, "shoal."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)

    def below(kind: type[ShoalError]) -> Iterator[type[ShoalError]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    ours = {one for one in below(ShoalError) if one.__module__.startswith("shoal.")}
    return tuple(sorted(ours, key=lambda one: one.code))


def documented() -> dict[str, tuple[str, str, str]]:
    """Code -> (name, meaning, what to do), from the tables of docs/errors.md."""
    rows = re.findall(
        r"^\| (SH-\d{3}) \| (\w+) \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE
    )
    assert len({code for code, *_ in rows}) == len(rows), "a code stands twice in docs/errors.md"
    return {code: (name, meaning, advice) for code, name, meaning, advice in rows}


def test_no_two_errors_share_a_code() -> None:
    first: dict[str, type[ShoalError]] = {}
    shared = [(one.code, one, first[one.code]) for one in all_errors() if first.setdefault(one.code, one) is not one]
    assert shared == []


def test_every_error_has_a_code_of_its_own() -> None:
    inherited = [one.__qualname__ for one in all_errors() if "code" not in vars(one)]
    assert inherited == []
    assert [one.code for one in all_errors() if not re.fullmatch(r"SH-[1-6]\d\d", one.code)] == []


def test_a_code_stands_in_the_hundred_of_its_base() -> None:
    for one in all_errors():
        base = next(base for base in HUNDREDS if issubclass(one, base))
        assert one.code.startswith(HUNDREDS[base]), f"{one.__qualname__} is a {base.__name__} and has {one.code}"


def test_every_error_stands_in_the_docs() -> None:
    known = documented()
    missing = [f"{one.code} {one.__name__}" for one in all_errors() if known.get(one.code, ("",))[0] != one.__name__]
    assert missing == [], "docs/errors.md lacks these, or calls them by another name"


def test_the_docs_name_no_error_that_there_is_not() -> None:
    assert sorted(set(documented()) - {one.code for one in all_errors()} - bare_codes()) == []


def bare_codes() -> set[str]:
    """Codes that are sent without a class of their own: what failed in the engine's process, and SH-000."""
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    return {code for text in sources for code in re.findall(r'"(SH-\d{3})"', text)}


def test_codes_without_a_class_are_explained_too() -> None:
    assert sorted(bare_codes() - set(documented()) - {"SH-000"}) == []


def test_every_error_says_what_it_is() -> None:
    assert [one.__qualname__ for one in all_errors() if not one.__doc__ or not one.__doc__.strip()] == []
