"""EVA: exact attention nearby, and one control variate for every chunk of tokens further away.

`method` is the method, `streamed` its causal form over a growing prefix. Its steps are a module each: `layouts` and
`images` cut windows and chunks, `chunks` makes one synthetic token of every chunk, `windows` attends.
"""

from approx_attention.methods.eva.method import OFFICIAL_EVA, chunk_means, eva
from approx_attention.methods.eva.streamed import running_eva

__all__ = ["OFFICIAL_EVA", "chunk_means", "eva", "running_eva"]
