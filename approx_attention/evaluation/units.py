"""Numbers as text."""

import math


def times(ratio: float, more: str, less: str) -> str:
    """A ratio as text with its direction.

    Args:
        ratio: the ratio.
        more: the word for a ratio above 1.
        less: the word for a ratio below 1.

    Returns:
        The text; empty unless the ratio is positive and finite.

    Example:
        >>> times(2.5, "faster", "slower"), times(1 / 340, "faster", "slower"), times(1.0, "faster", "slower")
        ('2.5x faster', '340x slower', '1x')
    """
    if not (ratio > 0 and math.isfinite(ratio)):
        return ""
    factor = max(ratio, 1 / ratio)
    number = f"{factor:.0f}" if factor >= 100 else f"{factor:.3g}"
    return "1x" if number == "1" else f"{number}x {more if ratio > 1 else less}"


def in_units(num_bytes: int) -> str:
    """Bytes as text, in KiB from 1024 on."""
    return f"{num_bytes} B" if num_bytes < 1024 else f"{num_bytes / 1024:.4g} KiB"
