"""EVA: exact attention within a window, and one control variate for every chunk of distant tokens.

`method` defines the method, `streamed` its causal form over a growing prefix. Each step has a module: `layouts` and
`images` cut windows and chunks, `chunks` makes one synthetic token per chunk, `windows` attends.
"""

from approx_attention.methods.eva.method import OFFICIAL_EVA, chunk_means, eva
from approx_attention.methods.eva.streamed import running_eva

__all__ = ["OFFICIAL_EVA", "chunk_means", "eva", "running_eva"]
