"""From run directories to one self-contained HTML page."""

from sordino.report.html import write_report

__all__ = ["write_report"]
