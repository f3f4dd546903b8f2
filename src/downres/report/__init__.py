"""The report: one self-contained HTML page of a search."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from .report import Overlay, Photo, ReportView, Scene, Segmentation, View, build_report, write_report

__all__ = ["Overlay", "Photo", "ReportView", "Scene", "Segmentation", "View", "build_report", "write_report"]

# Whoever needs the words alone must not wait for Plotly.
lazy(__name__, {"report": __all__})
