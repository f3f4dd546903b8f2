"""What every reader of image files refuses."""

MAX_PIXELS = 89_478_485
"""Larger pictures are refused from their header; the same number as PIL's own decompression-bomb threshold."""


class Unreadable(Exception):
    """A file that gives no picture. Its text is the short reason: 'empty file', 'not an image', 'truncated'."""
