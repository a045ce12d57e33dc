"""Fixtures of tests of commands."""

import pytest
from matplotlib.figure import Figure

from approx_attention.evaluation import kinds


@pytest.fixture
def empty_figures(monkeypatch):
    """Draw nothing in figures, which takes longer than all else in tests of what is written."""
    for name in ("draw_frontiers", "draw_compared_layers", "draw_plan"):
        monkeypatch.setattr(kinds, name, lambda *args: Figure())
