"""The report: one self-contained HTML page of a search."""

from .report import Photo, ReportView, View, build_report, write_report

__all__ = ["Photo", "ReportView", "View", "build_report", "write_report"]
