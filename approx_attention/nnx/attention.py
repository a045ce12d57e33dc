"""`ApproxAttention`: approximate attention as the ``attention_fn`` of layers of Flax nnx models."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, PrecisionLike
from jax import Array, lax
from jax.sharding import Mesh

from approx_attention import distributed, flax_arguments
from approx_attention.api import attention
from approx_attention.core import cache_dtype, check_count, check_flag
from approx_attention.decoding import (
    Certificate,
    CertifiedCache,
    CompressedDecoder,
    HeadsDecoder,
    MixedDecoder,
    compress_heads,
)
from approx_attention.nnx.owned import OwnedArrays
from approx_attention.nnx.streams import layer_stream
from approx_attention.registry import BoundMethod, HeadMethods


class ApproxAttention(nnx.Module):
    r"""Attention by any method, as ``nnx.MultiHeadAttention(attention_fn=...)`` or standalone.

    Its random projections and learned arrays are part of the model's state.

    Args:
        method: a name in `METHODS`, a function ``(q, k, v, key) -> out`` of one head, a bound method
            (`approx_attention.registry.bind`), a method for each key head (`approx_attention.registry.HeadMethods`),
            or a module with learned arrays, such as `Eva`, `Lara`, `LinformerAttention` or `Rfa`.
        is_causal: query t sees keys j <= t, even if the layer does not request it.
        rngs: streams, of which a random method forks ``attention``, or an ``nnx.RngStream`` to use directly.
        redraw: how long a random method keeps a random projection: always, for one call, or for ``every`` calls.
            After ``model.eval()`` it keeps the last one.
        every: the number of calls with ``"every_n"``.
        noise: whether to sample noise for methods that are random only with a PRNG key (`lara`, `eva`).
        learned: random projections or given arrays of the method that are parameters, such as ``("projection",)``.
        head_dim: the number D of channels of a head, required if ``learned`` names an array that is not given.
        per_head: arrays of the method that differ between key heads ``[K, ...]``, such as a ``proposal`` from
            `fit_proposal` for each. They are variables of the layer, like other arrays of the method.
        causal_mask: with ``"as_is_causal"`` a mask that differs between queries is taken as ``is_causal`` and padding.
            It must be a causal mask, or one combined with padding (``nnx.make_causal_mask``, ``nnx.combine_masks``). A
            traced mask cannot be checked. Outputs of padding queries are arbitrary.
        dropout: with ``"output"`` the layer's ``dropout_rate`` applies to the output of attention instead of the
            weights, which are never computed.
        mesh: devices over which sequences are sharded, as in `approx_attention.distributed`; None for one device.
        sequence_axis: the mesh axis of the tokens, ``"sequence"`` by default.
        batch_axis: a mesh axis of the batch; if it does not divide the batch, every row computes the whole batch.
        head_axis: a mesh axis of the heads.
        **hyperparameters: arguments of the method, such as ``num_features=128``. Arrays among them become variables of
            the layer, saved with the model and not trained.

    Raises:
        ValueError: the method is unknown, a random method has no ``rngs``, or options are incompatible.
        TypeError: the method has no such argument.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import ApproxAttention
        >>> rngs = nnx.Rngs(0)
        >>> favor = ApproxAttention("favor", num_features=64, rngs=rngs)
        >>> layer = nnx.MultiHeadAttention(num_heads=4, in_features=32, attention_fn=favor, decode=False, rngs=rngs)
        >>> layer(jnp.ones((2, 100, 32)), is_causal=True).shape
        (2, 100, 32)
    """

    def __init__(
        self,
        method: str | Callable[..., Array] | BoundMethod | HeadMethods | nnx.Module,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        redraw: Literal["never", "every_call", "every_n"] = "never",
        every: int | None = None,
        noise: bool = False,
        learned: Sequence[str] = (),
        head_dim: int | None = None,
        per_head: Mapping[str, Any] | None = None,
        causal_mask: Literal["error", "as_is_causal"] = "error",
        dropout: Literal["error", "output"] = "error",
        mesh: Mesh | None = None,
        sequence_axis: str | None = None,
        batch_axis: str | None = None,
        head_axis: str | None = None,
        **hyperparameters: Any,
    ):
        every = flax_arguments.check_redraw(redraw, every)
        flax_arguments.check_opt_ins(causal_mask, dropout)
        self.causal_mask, self.dropout = causal_mask, dropout
        self.method, self.is_causal = method, check_flag("is_causal", is_causal)
        if mesh is None and (sequence_axis is not None or batch_axis is not None or head_axis is not None):
            raise ValueError(
                "sequence_axis, batch_axis and head_axis need a mesh; got "
                f"{sequence_axis!r}, {batch_axis!r} and {head_axis!r}"
            )
        self.mesh, self.sequence_axis = mesh, sequence_axis or "sequence"
        self.batch_axis, self.head_axis = batch_axis, head_axis
        self.redraw, self.every = redraw, every
        # Set by `model.train()` and `model.eval()`.
        self.deterministic = False
        bound, scale, self.name, draws = _bound(method, noise, hyperparameters)
        if mesh is not None and (not isinstance(bound, BoundMethod) or bound.registered is None):
            raise NotImplementedError(f"method {self.name!r} does not support a mesh; methods of the registry do")
        bound, shared, of_heads = flax_arguments.split_owned(bound, scale, per_head)
        if mesh is not None and of_heads:
            raise NotImplementedError(f"per_head is not supported with a mesh, got {', '.join(of_heads)}")
        given = {*shared, *of_heads}
        self.owned = OwnedArrays(shared, of_heads, learned)
        draws = draws and not (isinstance(bound, BoundMethod) and bound.has_noise(given))
        if draws and rngs is None:
            raise ValueError(f"method {self.name!r} is random: pass rngs, as in rngs=nnx.Rngs(attention=0)")
        if rngs is not None and not isinstance(rngs, nnx.Rngs | nnx.RngStream):
            raise TypeError(f"rngs must be nnx.Rngs or an nnx.RngStream, got {rngs!r}")
        self.bound, self.scale = nnx.static(bound), nnx.static(scale)
        learned = tuple(name for name in learned if name not in given)
        stream = layer_stream(rngs) if draws or learned else None
        self.stream = nnx.data(stream if draws else None)
        self.learned = nnx.Dict(self._first_draw(learned, head_dim, stream))
        self._hold(None, {}, None)

    def _first_draw(
        self, learned: tuple[str, ...], head_dim: int | None, stream: nnx.RngStream | None
    ) -> dict[str, nnx.Param]:
        if not learned:
            return {}
        bound = self._registered()
        if head_dim is None or stream is None or bound is None or not bound.registered or not bound.registered.draw:
            raise ValueError(
                f"learned={learned} needs head_dim, rngs and a registered random method, got head_dim={head_dim}, "
                f"rngs={stream}, method {self.name!r}"
            )
        drawn = bound.projections(stream.key[...], head_dim)
        return {name: nnx.Param(flax_arguments.drawn_array(self.name, drawn, name)) for name in learned}

    def rng(self) -> Array | None:
        """The PRNG key of this call; advances the stream when a new projection is due."""
        if self.stream is None:
            return None
        if not self.deterministic and self.redraw != "never":
            self.stream.count[...] += 1
        return self._last_key(self.stream)

    def _last_key(self, stream: nnx.RngStream) -> Array:
        """The PRNG key of the last call that advanced the stream, or of the first one."""
        if stream.key.shape:
            raise ValueError(
                f"method {self.name!r} has random projections for {stream.key.shape} stacked layers, but one layer is "
                "called: map nnx.RngState over the same axis as nnx.Param, as in_axes=0 of nnx.scan and nnx.vmap does"
            )
        if self.redraw == "never":
            return stream.key[...]
        return jax.random.fold_in(stream.key[...], (jnp.maximum(stream.count[...], 1) - 1) // self.every)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set the options of ``nnx.view``.

        Args:
            deterministic: whether to keep the last random projection.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None = None,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: Dtype | None = None,
        precision: PrecisionLike = None,
        module: nnx.Module | None = None,
        is_causal: bool = False,
        input_positions: Array | None = None,
        *,
        key_value_seq_lengths: Array | None = None,
        **per_token: Array | None,
    ) -> Array:
        """Compute attention, with the signature that ``nnx.MultiHeadAttention`` expects.

        Args:
            query: ``[..., T, N, D]``.
            key: ``[..., S, K, D]``.
            value: ``[..., S, K, Dv]``.
            mask: padding ``[..., 1, 1, S]``, boolean or 0 and 1; causal masks with ``causal_mask="as_is_causal"``;
                other masks only for methods with ``dense_mask``.
            dropout_rng: PRNG key for ``dropout="output"``.
            dropout_rate: must be 0, unless ``deterministic`` or with ``dropout="output"``.
            broadcast_dropout: whether to drop the same entries in all sequences and heads.
            deterministic: whether dropout is off.
            dtype: computation dtype, by default that of the arrays.
            precision: precision of matrix products.
            module: must be None (``sow_weights=False``).
            is_causal: query t sees keys j <= t.
            input_positions: must be None.
            key_value_seq_lengths: real keys per sequence, ``[...]``; not passed by Flax, but your layers may.
            **per_token: arguments with one number per key, ``[..., S, K]``, such as ``gate_logits`` of gated `rfa`, or
                arguments of a module; not passed by Flax either.

        Returns:
            ``[..., T, N, Dv]``.

        Raises:
            NotImplementedError: dropout, sown weights, or a mask that the method does not support.
            ValueError: a floating-point mask with other values than 0 and 1, dropout without ``dropout_rng``, or a rate
                that is not from 0 to 1.
            TypeError: an argument with one number per key that the method does not have.
        """
        flax_arguments.check_unused(
            self.name,
            dropout=self.dropout,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            module=module,
            input_positions=input_positions,
        )
        query, key, value = flax_arguments.promoted((query, key, value), dtype)
        # A cache is already causal, whether or not its method supports every mask.
        dense = self.cache is None and self._takes_dense_mask
        mask = flax_arguments.as_boolean(mask)
        mask, causal = flax_arguments.without_causality(self.name, mask, self.causal_mask, dense=dense)
        if self.bound is not None:
            one = self._registered()
            known = one.registered.per_token if one and one.registered else ()
            if unknown := [name for name in per_token if name not in known]:
                raise TypeError(f"method {self.name!r} has no argument {', '.join(unknown)} with one number per key")
        given = {name: x for name, x in per_token.items() if x is not None}
        with flax_arguments.matmul_precision(precision):
            if self.cache is not None:
                out = self._extend(query, key, value, mask, key_value_seq_lengths, given)
            else:
                is_causal = check_flag("is_causal", is_causal) or self.is_causal or causal
                out = self._whole(query, key, value, mask, is_causal, key_value_seq_lengths, given)
        return flax_arguments.with_dropout(out, dropout_rate, deterministic, dropout_rng, broadcast_dropout)

    def _whole(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None,
        is_causal: bool,
        lengths: Array | None,
        per_token: dict[str, Array],
    ) -> Array:
        module: Any = self.method if isinstance(self.method, nnx.Module) else None
        always = module is not None and module.is_causal
        dense = self._takes_dense_mask
        sizes = query.shape[-3], key.shape[-3]
        is_causal = flax_arguments.check_mask(self.name, mask, is_causal or always, *sizes, dense=dense)
        if module is not None:
            if is_causal and not always:
                raise ValueError(f"{self.name} was made without is_causal, but the call requests causal attention")
            if always and not is_causal:
                raise NotImplementedError(f"{self.name} was made causal: its one query would see the first key only")
            return module(query, key, value, rng=self.rng(), mask=mask, key_value_seq_lengths=lengths, **per_token)
        assert self.bound is not None
        shared, of_heads = self.owned.read()
        arguments: dict[str, Any] = {**shared, **self._learned(), **per_token}
        arguments |= {"is_causal": is_causal, "rng": self.rng()}
        arguments |= {"method": self.bound, "scale": self.scale, "key_value_seq_lengths": lengths}
        if self.mesh is None:
            return attention(query, key, value, mask=mask, per_head=of_heads or None, **arguments)
        if mask is not None:
            raise NotImplementedError(f"method {self.name!r} with a mesh supports key_value_seq_lengths, but no mask")
        return distributed.attention(
            query,
            key,
            value,
            mesh=self.mesh,
            axis=self.sequence_axis,
            batch_axis=None if query.shape[0] % self.mesh.shape.get(self.batch_axis, 1) else self.batch_axis,
            head_axis=self.head_axis,
            **arguments,
        )

    def _registered(self) -> BoundMethod | None:
        """The common method of all heads, if it is in the registry."""
        bound = self.bound
        return bound if isinstance(bound, BoundMethod) and bound.registered else None

    @property
    def _takes_dense_mask(self) -> bool:
        """Whether the method supports a mask that differs between queries."""
        return self.bound is not None and self.bound.takes("mask")

    def _learned(self) -> dict[str, Any]:
        return {name: x[...] for name, x in self.learned.items()}

    def init_cache(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        max_length: int | None = None,
        ragged: bool = False,
        dtype: Any = jnp.float32,
        certify: float | None = None,
        cache_bits: int | None = None,
        block_size: int | None = None,
        keep_queries: int = 0,
        num_heads: int | None = None,
    ) -> None:
        """Start decoding: every call appends tokens to a cache, as in `HeadsDecoder`.

        A call may append any number of tokens. With ``ragged`` its mask ``[B, 1, 1, T]`` marks the real tokens of each
        sequence, which must come first; under jit, outputs are NaN if real tokens follow padding.

        Args:
            batch_size: the number B of sequences.
            num_kv_heads: the number K of key heads.
            head_dim: channels D of queries and keys.
            value_dim: channels Dv of values, D by default.
            max_length: the largest number of tokens of a sequence, for methods whose cache grows.
            ragged: whether sequences may differ in length.
            dtype: dtype of the cache.
            certify: the largest error of a step, as in `HeadsDecoder`; needs ``max_length``.
            cache_bits: 8 or 4 bits per channel of older tokens, for ``"exact"``.
            block_size: tokens per block, for ``"exact"``; the last one or two blocks stay exact when a cache is
                compressed.
            keep_queries: number of recent queries to keep for `compress_cache`.
            num_heads: the number N of query heads, required with ``keep_queries``.

        Raises:
            NotImplementedError: the method has no running summary, or does not support ``cache_bits``, or the layer
                has a mesh.
            TypeError: the dtype is neither float32 nor float64, or ``num_heads`` is missing.
        """
        if self.mesh is not None:
            raise NotImplementedError("a layer with a mesh does not support decoding; make one without mesh")
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        sizes = {**sizes, "max_length": max_length, "dtype": cache_dtype(dtype)}
        sizes |= {"certify": certify, "cache_bits": cache_bits, "block_size": block_size}
        kept = None
        if check_count("keep_queries", keep_queries, least=0):
            if num_heads is None:
                raise TypeError("keep_queries needs num_heads, the number of query heads")
            kept = jnp.zeros((batch_size, keep_queries, check_count("num_heads", num_heads), head_dim), sizes["dtype"])
        # A cache has one random projection, so no call advances the stream.
        rng = None if self.stream is None else self._last_key(self.stream)
        of_heads = self.owned.read()[1]
        own: dict[str, Any] = {"per_head": of_heads} if of_heads else {}
        self._start(self._decoder(sizes).init(batch_size, rng, ragged=ragged, **own), kept, sizes)

    def compress_cache(self, key: Array, *, queries: Array | None = None, **options: Any) -> None:
        """Compress the cache of exact attention; calls continue from the compressed tokens.

        Args:
            key: typed PRNG key.
            queries: queries for the policy ``[B, T, N, D]``, by default the kept ones.
            **options: arguments of `compress_heads`.

        Raises:
            TypeError: the cache does not contain unchanged tokens.
            ValueError: there is no cache, or as in `compress_cache`.
        """
        if self.cache is None:
            raise ValueError("there is no cache to compress: call init_cache, then the layer on the prompt")
        queries = self.last_queries() if queries is None else queries
        decoder = self._decoder(self.sizes)
        if isinstance(decoder, MixedDecoder):
            raise TypeError(f"{self.name} has a method for each head; only caches of 'exact' can be compressed")
        decoder, cache = compress_heads(decoder, self._cached()[0], key, queries=queries, **options)
        self._start(cache, None, {**self.sizes, **decoder.prefix})

    def last_queries(self) -> Array | None:
        """The kept queries ``[B, W, N, D]``, None without ``keep_queries``.

        In a sequence of fewer tokens the first one is repeated before the others.
        """
        if self.cache is None or self._cached()[1] is None:
            return None
        cache, kept = self._cached()
        assert kept is not None
        batch, number = kept.shape[:2]
        first = number - jnp.clip(jnp.broadcast_to(cache.length, (batch,)), 1, number)
        place = jnp.maximum(jnp.arange(number, dtype=jnp.int32)[None, :], first[:, None])
        return jnp.take_along_axis(kept, place[:, :, None, None], axis=1)

    def drop_cache(self) -> None:
        """End decoding: calls take whole sequences again."""
        self._hold(None, {}, None)

    def _start(self, cache: Any, kept: Array | None, sizes: dict[str, Any]) -> None:
        leaves, treedef = jax.tree.flatten((cache, kept))
        self._hold(nnx.List([nnx.Cache(x) for x in leaves]), sizes, treedef)

    def _held(self) -> tuple[nnx.List | None, dict[str, Any], Any]:
        """The cache, the sizes it was made with, and its structure."""
        return self.cache, self.sizes, self.treedef

    def _hold(self, cache: nnx.List | None, sizes: dict[str, Any], treedef: Any) -> None:
        """Restore the result of `_held`, or None for no cache."""
        self.cache, self.sizes, self.treedef = nnx.data(cache), nnx.static(sizes), nnx.static(treedef)

    @property
    def num_seen(self) -> Array:
        """The number of tokens in the cache, ``[]``, or ``[B]`` if sequences may differ; 0 without a cache.

        For stacked layers it has the axes of the stack in front.
        """
        return jnp.zeros((), jnp.int32) if self.cache is None else self._cached()[0].length

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the cache, with axes ``[B, K]``; None without ``certify``."""
        heads = None if self.cache is None else getattr(self._cached()[0], "heads", None)
        return heads.certificate if isinstance(heads, CertifiedCache) else None

    @property
    def cache_bytes(self) -> int:
        """The number of bytes of the cache."""
        return sum(x[...].nbytes for x in self.cache or ())

    def _cached(self) -> tuple[Any, Array | None]:
        """The cache, and the last queries where they are kept."""
        return jax.tree.unflatten(self.treedef, [x[...] for x in self.cache or ()])

    def _decoder(self, sizes: dict[str, Any]) -> HeadsDecoder | MixedDecoder:
        if isinstance(self.bound, HeadMethods):
            return MixedDecoder(self.bound, **sizes, scale=self.scale)
        bound = self._registered()
        if bound is None:
            raise NotImplementedError(f"{self.name} does not support decoding; methods of the registry with decode do")
        kind = CompressedDecoder if "prefix_budget" in sizes else HeadsDecoder
        return kind(bound, **sizes, scale=self.scale, **self.owned.read()[0], **self._learned())

    def _extend(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None,
        lengths: Array | None,
        per_token: dict[str, Array],
    ) -> Array:
        if per_token:
            raise NotImplementedError(f"method {self.name!r} does not support {', '.join(per_token)} while decoding")
        dense = self._takes_dense_mask
        flax_arguments.check_mask(self.name, mask, False, query.shape[-3], key.shape[-3], dense=dense)
        first = None
        if mask is not None:
            masked, first = flax_arguments.real_tokens(mask, key.shape[0], key.shape[1])
            lengths = masked if lengths is None else jnp.minimum(lengths, masked)
        cache, kept = self._cached()
        out, cache = self._decoder(self.sizes).extend(cache, query, key, value, lengths)
        kept = None if kept is None else _with_last(kept, query, lengths)
        if first is not None:
            # A compiled program cannot raise an error.
            out = jnp.where(first[:, None, None, None], out, jnp.full_like(out, jnp.nan))
        for variable, x in zip(self.cache or (), jax.tree.leaves((cache, kept)), strict=True):
            variable[...] = x
        return out


def _with_last(kept: Array, query: Array, lengths: Array | None) -> Array:
    """The last W real queries of each sequence, including those of new tokens ``[B, T, N, D]``."""
    joined = jnp.concatenate([kept, query.astype(kept.dtype)], axis=1)
    if lengths is None:
        return joined[:, query.shape[1] :]
    start = jnp.clip(lengths, 0, query.shape[1])
    return jax.vmap(lambda x, start: lax.dynamic_slice_in_dim(x, start, kept.shape[1]))(joined, start)


def _bound(
    method: str | Callable[..., Array] | BoundMethod | HeadMethods | nnx.Module,
    noise: bool,
    hyperparameters: dict[str, Any],
) -> tuple[BoundMethod | HeadMethods | None, Any, str, bool]:
    """The bound method if it is not a module, the scale, the name for errors, and whether the method is random."""
    if not isinstance(method, nnx.Module):
        bound, scale, draws = flax_arguments.bind_layer(method, noise, hyperparameters)
        return bound, scale, bound.name, draws
    if hyperparameters:
        raise TypeError(f"{type(method).__name__} already has its options, got {', '.join(hyperparameters)}")
    rng = inspect.signature(method).parameters.get("rng")
    if rng is None or not hasattr(method, "is_causal"):
        raise TypeError(
            "a module must be called as LearnedAttention is, (query, key, value, *, rng, key_value_seq_lengths, mask), "
            f"and have is_causal; got {type(method).__name__}"
        )
    return None, None, type(method).__name__, rng.default is inspect.Parameter.empty or noise
