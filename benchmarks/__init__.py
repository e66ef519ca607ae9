"""Benchmarks, each with its records under `results`; README.md says how to run them."""
