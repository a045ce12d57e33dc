"""Measurements of speed and memory, interleaved in one run; not part of the tests."""
