"""Fuzz targets: each module has a `check(data)` that must raise nothing, whatever the bytes.

`python tests/fuzz/names.py -max_total_time=600` runs one under atheris (`pip install atheris`), which looks for bytes
that reach new code. What it finds becomes a test; `tests/test_fuzz.py` runs a short form of each with hypothesis.
"""
