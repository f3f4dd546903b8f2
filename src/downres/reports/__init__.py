"""The report: one self-contained HTML page of a search."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from .page import Section
    from .report import ReportView, build_report, write_report

__all__ = ["ReportView", "Section", "build_report", "write_report"]

# Whoever needs the words alone must not wait for Plotly.
__getattr__, __dir__ = lazy(__name__, {"page": ("Section",), "report": ("ReportView", "build_report", "write_report")})
