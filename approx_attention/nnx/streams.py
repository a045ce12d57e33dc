"""The random streams of attention layers."""

from flax import nnx


def attention_stream(rngs: nnx.Rngs | nnx.RngStream) -> nnx.RngStream:
    """The random stream of attention.

    Args:
        rngs: streams by name, of which ``attention`` or the default one is taken; or a stream, which is returned.

    Returns:
        The stream.

    Raises:
        ValueError: neither ``attention`` nor a default stream.
    """
    if isinstance(rngs, nnx.RngStream):
        return rngs
    if "attention" not in rngs and "default" not in rngs:
        raise ValueError(
            "rngs needs the stream 'attention', as in nnx.Rngs(attention=0), or a default stream, as in nnx.Rngs(0); "
            f"got {', '.join(rngs) or 'no stream'}"
        )
    return rngs.attention


def layer_stream(rngs: nnx.Rngs | nnx.RngStream | None) -> nnx.RngStream | None:
    """The random stream of one layer.

    Args:
        rngs: streams by name, a stream, or None.

    Returns:
        A fork of the stream ``attention`` of ``nnx.Rngs``, which advances the latter; a given stream itself; or None.

    Raises:
        ValueError: no such stream, or one with a key for each layer of a stack.
    """
    stream = None if rngs is None else attention_stream(rngs)
    if stream is not None and stream.key.shape:
        raise ValueError(
            f"rngs must have one key, got keys of shape {stream.key.shape}: make stacked layers inside nnx.vmap, or "
            "use replace_attention on existing stacks"
        )
    return stream.fork() if isinstance(rngs, nnx.Rngs) and stream is not None else stream
