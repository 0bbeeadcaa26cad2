"""Benchmarks: cases with their peers side by side, results as JSON, tables and plots from it.

``python -m bench list`` shows the cases. ``pytest --benchmark`` runs the microbenchmarks.
"""
