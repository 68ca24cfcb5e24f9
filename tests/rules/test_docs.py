"""The pages lead where they say, and name what there is."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from shoal.cli.app import app
from shoal.cli.main import load_commands

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ROOMS = sorted(path.parent.name for path in (ROOT / "src" / "shoal").glob("*/__init__.py"))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as they are made where the pages are shown."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"`((?:src|tests|benchmarks|examples|docs|requirements)/[\w./-]+)`", prose(page))
    if page.name in ("CHANGELOG.md", "log.md"):  # they tell of what was
        named = []
    made_by_runs = ("benchmarks/results/",)
    assert [name for name in named if name not in made_by_runs and not (ROOT / name).exists()] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\[[^\]]*\]\(([^)\s#]+\.md)[^)]*\)", prose(page)):
            if not re.match(r"[a-z]+:", target):
                todo.append((page.parent / target).resolve())
    assert sorted(str(page.relative_to(ROOT)) for page in set(PAGES) - seen) == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_on_the_map(room: str) -> None:
    """In the layers of the map, and with a page of its own or a place on another's."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    layers = text[text.index("## Rooms") : text.index("## Processes")]
    assert re.search(rf"\b{room}\b", layers), f"{room} is not in the layers of docs/architecture.md"
    pages = layers[layers.index("| room | page |") :]
    assert re.search(rf"^\| `{room}`.* \| .*\]\(\S+\.md\)", pages, re.MULTILINE), f"{room} has no page"


def test_every_command_and_option_stands_on_its_page() -> None:
    load_commands()
    page = (ROOT / "docs" / "cli.md").read_text()
    missing = []

    def look(command: Any, path: str) -> None:
        if not hasattr(command, "commands") and f"`{path}" not in page:
            missing.append(path)
        for one in command.params:
            if one.param_type_name == "option" and not one.hidden:
                missing.extend(f"{path} {flag}" for flag in one.opts if not re.search(rf"`[^`]*{flag}\b", page))
        for name, below in getattr(command, "commands", {}).items():
            look(below, f"{path} {name}")

    look(get_command(app), "shoal")
    assert missing == []


def test_the_pages_speak_of_no_particular_machine() -> None:
    for page in PAGES:
        assert re.findall(r"(?:^|[\s`(\"'])(/(?:home|root|tmp|work|Users)/\S+)", page.read_text()) == [], page.name


def test_nothing_that_is_made_here_is_kept_in_the_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    assert [name for name in kept if re.match(r"(?:runs|\.venv|build)/|.*\.pyc$|.*\.pkl$", name)] == []
