"""The report: one self-contained HTML page of a search."""

from .report import Overlay, Photo, ReportView, Scene, Segmentation, View, build_report, write_report

__all__ = ["Overlay", "Photo", "ReportView", "Scene", "Segmentation", "View", "build_report", "write_report"]
