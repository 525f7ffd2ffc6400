"""Tests of hpcasync.models."""
