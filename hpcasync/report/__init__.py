"""Runs explained: one self-contained HTML page of plots and tables."""
