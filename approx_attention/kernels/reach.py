"""Which keys a query sees, by position."""

from typing import NamedTuple


class Reach(NamedTuple):
    """The band of keys that each query sees, known when the program is traced.

    Attributes:
        offset: query t stands at position t + offset of the keys.
        left: it sees no key before position t + offset - left; None: all earlier keys.
        right: it sees no key behind position t + offset + right; None: all later keys.
    """

    offset: int = 0
    left: int | None = None
    right: int | None = None
