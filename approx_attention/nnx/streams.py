"""The random streams of attention layers."""

from flax import nnx


def attention_stream(rngs: nnx.Rngs | nnx.RngStream) -> nnx.RngStream:
    """The stream of random methods; raises ``ValueError`` if there is none."""
    if isinstance(rngs, nnx.RngStream):
        return rngs
    if "attention" not in rngs and "default" not in rngs:
        raise ValueError(
            "rngs needs the stream 'attention', as nnx.Rngs(attention=0) has it, or nnx.Rngs(0) by default; "
            f"got {', '.join(rngs) or 'no stream'}"
        )
    return rngs.attention


def layer_stream(rngs: nnx.Rngs | nnx.RngStream | None) -> nnx.RngStream | None:
    """The random stream of one layer: a fork of the stream ``attention``, or the stream that is given."""
    stream = None if rngs is None else attention_stream(rngs)
    if stream is not None and stream.key.shape:
        raise ValueError(
            f"rngs must have one key, got keys of shape {stream.key.shape}: make stacked layers inside nnx.vmap, or "
            "put the method into layers that are stacked already by replace_attention"
        )
    return stream.fork() if isinstance(rngs, nnx.Rngs) and stream is not None else stream
