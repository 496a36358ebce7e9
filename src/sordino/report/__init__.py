"""From run directories to one self-contained HTML page."""

from sordino.report.html import finished_runs, write_report

__all__ = ["finished_runs", "write_report"]
