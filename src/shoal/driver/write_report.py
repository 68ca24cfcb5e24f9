"""Writing a run's report: figures in, report.html and report.json out. Where report.json says so, the run is finished:
it comes last."""

from __future__ import annotations

import os

import msgspec

from shoal.driver.account import read_contents
from shoal.driver.folder import RunFolder
from shoal.driver.report import Figures, Report, build_report, report_json
from shoal.driver.report_page import render_page


def make_report(folder: RunFolder, figures: Figures) -> Report:
    """The report of what the folder holds and these figures."""
    return build_report(read_contents(folder), figures)


def write_report(folder: RunFolder, figures: Figures) -> Report:
    """Make the report and write it in both forms; the figures too, so that it can be made again."""
    folder.write("figures.json", msgspec.json.encode(figures))
    report = make_report(folder, figures)
    folder.write("report.html", render_page(report).encode())
    folder.write("report.json", report_json(report))
    return report


def write_missing_page(folder: RunFolder, report: Report) -> None:
    """The page of a report, where there is none; also by one who only reads the folder, beside a driver at work."""
    page = folder.path / "report.html"
    if page.exists():
        return
    scratch = page.with_name(f".{page.name}.{os.getpid()}")
    try:
        scratch.write_bytes(render_page(report).encode())
        scratch.replace(page)
    finally:
        scratch.unlink(missing_ok=True)
