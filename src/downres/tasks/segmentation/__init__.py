"""Segmentation: layouts and legends of masks, mIoU by bootstrap, class maps at the labels' size, scenes in the report."""
