"""Benchmarks as functions that yield lines; the command line prints them."""
