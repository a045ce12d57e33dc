"""The case of the polynomial method of order two; tests/tensor tests it with the other orders."""

from approx_attention.tensor import total_degree
from tests.methods.case import Case

CASES = {
    "polynomial": Case(
        changes={
            "degree": 4,
            "coefficients": (1.0, 1.0, 0.9),
            "bound": 4.0,
            "rms": 2.0,
            "features": total_degree(8, 1),
        },
        contexts={
            "bound": {"coefficients": "minimax", "bound": 2.0},
            "rms": {"coefficients": "hermite", "rms": 1.0},
            "features": {"degree": None},
        },
        devices={"block_size": 4},
    ),
}
