"""Tests of hpcasync.data."""
