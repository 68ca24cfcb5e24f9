"""Writing a run's report: figures in, report.json and report.html out."""

from __future__ import annotations

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
    folder.write("report.json", report_json(report))
    folder.write("report.html", render_page(report).encode())
    return report
