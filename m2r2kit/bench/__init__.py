"""Measure, record, compare."""
