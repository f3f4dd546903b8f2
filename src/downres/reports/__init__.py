"""The report: one self-contained HTML page of a search."""

from .page import Section
from .report import ReportView, build_report, write_report

__all__ = ["ReportView", "Section", "build_report", "write_report"]
