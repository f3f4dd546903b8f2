"""Regression: one or more numbers an image, judged by mean absolute error."""
