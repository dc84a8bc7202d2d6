"""Contests with other packages and tables for the documents: what users of the library do not need.

``python -m benchmarks NAME``, from the repository's root; ``memformer bench`` has what runs with the library alone.
Each module has settings, whose texts are the help of its command, and ``run``, which yields the lines of a report.
"""
