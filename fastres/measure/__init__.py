"""Measuring: timing on the current device, result files, and reports made from them."""
