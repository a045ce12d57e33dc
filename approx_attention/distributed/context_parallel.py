r"""Attention over a sequence sharded across devices, which exchange only summaries or windows.

Each device has a part of the queries, keys and values, and summarises its keys. Moments are summed over devices, tokens
are gathered, and every device attends with its own queries. In the causal form a device receives one summary of all
parts before its own, and the block just before its first one exactly (a *halo*); the rest is the causal form of a
single device. Exact attention, which has no summary, sends all keys and values around a ring.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    AttentionState,
    Block,
    FeatureMoments,
    Past,
    RunningSummary,
    Summary,
    WeightedKV,
    accumulation_dtype,
    attend,
    by_kv_head,
    causal_blocks,
    check_count,
    check_flag,
    check_layout,
    each,
    finite_peak,
    fold_scale,
    from_kv_head,
    in_blocks,
    merge,
    out_of_blocks,
    scan_blocks,
    split_arrays,
    state_of_blocks,
    streamed_state,
    within,
)
from approx_attention.registry import METHODS, OPTIONS, BoundMethod, accepted, bind


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis: str,
    method: str | BoundMethod,
    rng: Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    key_value_seq_lengths: Array | None = None,
    batch_axis: str | None = None,
    head_axis: str | None = None,
    **hyperparameters: Any,
) -> Array:
    r"""Approximate attention over a sequence sharded over a mesh axis of p devices, by any method with a summary.

    .. math:: \mathrm{out}_r = \mathrm{attend}\Big(q_r,\ \bigcup_{r'} \mathrm{summary}(k_{r'}, v_{r'})\Big)

    Feature moments equal those of one device up to rounding. Methods with tokens (`coreset`, `mean_pool`,
    `uniform_sample`) keep ``size / p`` tokens of each device's part, so the summary has the same size as on one device,
    but is made shard by shard. In the causal form a query sees its block and the block before exactly, also across
    devices.

    Args:
        query: ``[B, T, N, D]``, sharded or not.
        key: ``[B, T, K, D]``.
        value: ``[B, T, K, Dv]``.
        mesh: the device mesh.
        axis: the mesh axis over which T is sharded; lengths that p does not divide are padded.
        method: a name in `METHODS` with a summary, ``"exact"`` (a ring) or ``"local"`` (halos), or a bound method.
        rng: typed PRNG key, as in `approx_attention.attention`.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        is_causal: query t sees keys j <= t.
        key_value_seq_lengths: real keys per sequence, ``[B]``.
        batch_axis: a mesh axis for B.
        head_axis: a mesh axis for N and K.
        **hyperparameters: hyper-parameters of the method.

    Returns:
        Outputs ``[B, T, N, Dv]`` in the dtype of ``value``.

    Raises:
        ValueError: shapes do not match, the method or a mesh axis is unknown, an axis does not divide the sequences or
            the key heads, a random method has no ``rng``, a window is longer than a device's part, or a size is below
            the number of devices.
        TypeError: a dtype is wrong, the method has no such argument, or an argument is neither hashable nor contains
            arrays.
        NotImplementedError: the method has no summary of all keys, or no causal one, or the summary does not support an
            option.

    Example:
        >>> import jax
        >>> from approx_attention import attention, distributed
        >>> mesh = jax.make_mesh((1,), ("sequence",))
        >>> query, key, value = (jax.random.normal(jax.random.key(i), (2, 64, 4, 8)) for i in range(3))
        >>> sharded = distributed.attention(query, key, value, mesh=mesh, axis="sequence", method="exact")
        >>> bool(abs(sharded - attention(query, key, value, method="exact")).max() < 1e-5)
        True

    Reference:
        :cite:p:`liu2023ring`, for exact attention.
    """
    is_causal = check_flag("is_causal", is_causal)
    check_layout(query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[:2] != query.shape[:2]:
            raise ValueError(f"{name} must be [B, T, N, D] with the B and T of query {query.shape[:2]}, got {x.shape}")
    if key_value_seq_lengths is not None:
        key_value_seq_lengths = jnp.asarray(key_value_seq_lengths)
        within(key_value_seq_lengths, query.shape[1], [query.shape[0]], "key_value_seq_lengths")
    for name in (axis, batch_axis, head_axis):
        if name is not None and name not in mesh.shape:
            raise ValueError(f"mesh has the axes {', '.join(mesh.shape)}, got {name!r}")
    for given, name, of, count in (
        ("batch_axis", batch_axis, "sequences", query.shape[0]),
        ("head_axis", head_axis, "key heads", key.shape[2]),
    ):
        if name is not None and count % mesh.shape[name]:
            raise ValueError(f"{given} must divide the {count} {of}, got {name!r} with {mesh.shape[name]} devices")
    bound = bind(method, hyperparameters, options=OPTIONS)
    bound.check_values({"scale": scale})
    static, arrays = split_arrays(bound.name, {**bound.hyperparameters, "scale": scale})
    unbound = dataclasses.replace(bound, hyperparameters={})
    call = _Call(unbound, is_causal, mesh, (batch_axis, axis, head_axis), static)
    with jax.disable_jit(False):
        return _over_devices(call, query, key, value, key_value_seq_lengths, rng, arrays)


class _Call(NamedTuple):
    """The static arguments of a call."""

    method: BoundMethod
    is_causal: bool
    mesh: Mesh
    axes: tuple[str | None, str, str | None]
    static: tuple[tuple[str, Any], ...]


@functools.partial(jax.jit, static_argnums=0)
def _over_devices(
    call: _Call,
    query: Array,
    key: Array,
    value: Array,
    lengths: Array | None,
    rng: Array | None,
    arrays: dict[str, Any],
) -> Array:
    """Run as one compiled program; executed operation by operation, devices would deadlock."""
    on_parts: Callable[..., Array] = functools.partial(_on_parts, call)
    laid_out = jax.typeof(query).sharding
    if laid_out.mesh.empty:  # under `jax.set_mesh` an unplaced tensor belongs to that mesh
        laid_out = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
    if AxisType.Explicit in laid_out.mesh.axis_types:  # outputs are placed like queries; inside, the compiler decides
        auto: Any = jax.sharding.auto_axes(on_parts, out_sharding=laid_out)
        on_parts = auto
    return on_parts(query, key, value, lengths, rng, arrays)


def _on_parts(
    call: _Call,
    query: Array,
    key: Array,
    value: Array,
    lengths: Array | None,
    rng: Array | None,
    arrays: dict[str, Any],
) -> Array:
    """Pad the sequence to equal parts, and let each device attend with its own part."""
    mesh, (batch_axis, axis, head_axis) = call.mesh, call.axes
    batch, length = query.shape[:2]
    hyperparameters = {**dict(call.static), **arrays}
    del hyperparameters["scale"]
    bound = dataclasses.replace(call.method, hyperparameters=hyperparameters)
    form = _form(bound, call.is_causal, mesh.shape[axis], length, query.shape[-1])
    dtype = value.dtype
    wide = accumulation_dtype(query, key, value)
    real = jnp.ones((batch, length), bool)
    if lengths is not None:
        real = jnp.arange(length)[None, :] < lengths[:, None]
    padding = -length % (mesh.shape[axis] * form.multiple)
    query, key, value, real = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        for x in (*(x.astype(wide) for x in (query, key, value)), real)
    )
    tokens, same = PartitionSpec(batch_axis, axis, head_axis, None), PartitionSpec()
    # Sampled once, instead of by every device in every use; each device gets the arrays of its heads.
    drawn = bound.draw(rng, key.shape[2], query.shape[-1])
    on_devices = jax.shard_map(
        functools.partial(_on_device, form, axis, dict(call.static)),
        mesh=Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)),
        in_specs=(tokens, tokens, tokens, PartitionSpec(batch_axis, axis), PartitionSpec(head_axis), same),
        out_specs=tokens,
        check_vma=False,
    )
    return on_devices(query, key, value, real, drawn, arrays)[:, :length].astype(dtype)


def _on_device(
    form: "_Form",
    axis: str,
    static: dict[str, Any],
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    drawn: dict[str, Array],
    arrays: dict[str, Any],
) -> Array:
    """The outputs for one device's queries ``[B, t, N, D]``."""
    form = form.given(arrays)
    batch, _, num_kv_heads, _ = k.shape
    drawn = jax.tree.map(lambda x: jnp.tile(x, (batch, *(1,) * (x.ndim - 1))), drawn)
    k, v = (jnp.where(real[:, :, None, None], x, jnp.zeros_like(x)) for x in (k, v))
    q, k = fold_scale(form.space(q), form.space(k), {**static, **arrays}["scale"])

    q, k, v = (by_kv_head(x, num_kv_heads) for x in (q, k, v))
    heads = _Heads(jnp.moveaxis(q, 2, 1), k[:, :, 0], v[:, :, 0], jnp.repeat(real, num_kv_heads, 0), drawn)
    return from_kv_head(jnp.moveaxis(form.answer(heads, axis), 1, 2), num_kv_heads)


class _Heads(NamedTuple):
    """The tokens of a device, one row per sequence and key head: q ``[H, G, t, D]``, k and v ``[H, t, .]``.

    `drawn` contains the random arrays of `BoundMethod.draw`, or PRNG keys, ``[H, ...]``.
    """

    q: Array
    k: Array
    v: Array
    real: Array
    drawn: dict[str, Array]


class _Form:
    """The form of a method across devices; parts are padded to a multiple of `multiple` tokens."""

    @property
    def multiple(self) -> int:
        return 1

    def given(self, arrays: dict[str, Any]) -> "_Form":
        """The form with the arrays of a device among its options."""
        return self

    def space(self, x: Array) -> Array:
        """Map queries or keys to those whose softmax attention the method estimates."""
        return x

    def answer(self, heads: _Heads, axis: str) -> Array:
        """The outputs ``[H, G, t, Dv]`` of one device; called on all devices."""
        raise NotImplementedError


def _form(bound: BoundMethod, is_causal: bool, devices: int, length: int, head_dim: int) -> _Form:
    method = bound.registered
    sender = method.sender(is_causal) if method else None
    if method is None or (sender is None and method.window is None):
        have = [name for name, other in METHODS.items() if other.sender(is_causal)]
        windows = [repr(name) for name, other in METHODS.items() if other.window]
        raise NotImplementedError(
            f"method {bound.name!r} has no {'running ' if is_causal else ''}summary to send; supported are "
            f"{', '.join(have)}, and {' and '.join(windows)}, which sends its window"
        )
    rings, used = method.sharding == "ring", {method.block}
    if not rings:
        used |= {*filter(None, [method.size]), *(accepted(sender, bound.hyperparameters) if sender else ())}
    for name in bound.hyperparameters:
        if name not in used:
            raise NotImplementedError(f"method {bound.name!r} does not support {name} across devices")
    if rings:
        return _Ring(is_causal)
    if method.window is not None:
        return _Halos(*method.window(bound.arguments, is_causal))
    options = dict(bound.hyperparameters)
    # A method without blocks summarises any number of tokens.
    block_size = bound.block_size if bound.takes(method.block) else 1
    if method.size is not None:
        size = bound.value(method.size)
        if size is None:
            raise NotImplementedError(f"method {bound.name!r} needs {method.size} across devices")
        options[method.size] = size = check_count(method.size, size)
        # Each device makes its share of a summary of a fixed number of tokens.
        if method.summary is WeightedKV and not method.grows:
            if size < devices:
                raise ValueError(f"{method.size} must be at least the number of devices, {devices}, got {size}")
            options[method.size] = size // devices
    # The capacity of a growing running summary is that of a device's part.
    options["max_length"] = -(-length // (devices * block_size)) * block_size
    bound = dataclasses.replace(bound, hyperparameters=options)
    return _Summaries(bound, is_causal, head_dim, block_size, method.summary is not FeatureMoments, method.grows)


@dataclasses.dataclass(frozen=True)
class _Ring(_Form):
    """Exact attention: keys and values visit every device, and are sent on before they are used."""

    is_causal: bool

    def answer(self, heads: _Heads, axis: str) -> Array:
        devices, own = lax.axis_size(axis), lax.axis_index(axis)
        onwards = [(i, (i + 1) % devices) for i in range(devices)]

        def visited(state: AttentionState, tokens: Any, step: Array) -> AttentionState:
            source = (own - step) % devices

            def one(args: Any) -> AttentionState:
                q, state, (k, v, real) = args
                whole = lambda q: streamed_state(q, k, v, real)  # noqa: E731
                half = lambda q: streamed_state(q, k, v, real, is_causal=True)  # noqa: E731
                none = lambda q: AttentionState.empty(q.shape[0], v.shape[1], v.dtype)  # noqa: E731
                forms = [jax.vmap(form) for form in (whole, half, none)]
                if not self.is_causal:
                    return merge(state, forms[0](q))
                which = jnp.where(source == own, 1, jnp.where(source < own, 0, 2))
                return merge(state, lax.switch(which, forms, q))

            return each(one, (heads.q, state, tokens))

        def step(carry: Any, index: Array) -> tuple[Any, None]:
            state, tokens = carry
            # Computation and communication of a step are independent, so they can overlap.
            sent = jax.tree.map(lambda x: lax.ppermute(x, axis, onwards), tokens)
            return (visited(state, tokens, index), sent), None

        tokens = heads.k, heads.v, heads.real
        rows = heads.q.shape[:3]
        empty = AttentionState(
            jnp.zeros((*rows, heads.v.shape[-1]), heads.v.dtype), jnp.full(rows, -jnp.inf, heads.v.dtype)
        )
        (state, tokens), _ = lax.scan(step, (empty, tokens), jnp.arange(devices - 1, dtype=jnp.int32))
        return visited(state, tokens, jnp.int32(devices - 1)).out


@dataclasses.dataclass(frozen=True)
class _Halos(_Form):
    """A window: each device gets the last keys of the previous device and the first keys of the next one."""

    left: int
    right: int

    def answer(self, heads: _Heads, axis: str) -> Array:
        part = heads.k.shape[1]
        if max(self.left, self.right) > part:
            raise ValueError(f"window_size must fit a device's part of {part} tokens, got {self.left, self.right}")
        tokens = heads.k, heads.v, heads.real
        before = jax.tree.map(lambda x: _from_neighbour(x[:, part - self.left :], axis, 1), tokens)
        after = jax.tree.map(lambda x: _from_neighbour(x[:, : self.right], axis, -1), tokens)
        around = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), before, tokens, after)

        def one(args: Any) -> Array:
            q, (k, v, real) = args
            bias = jnp.where(real, jnp.zeros((), q.dtype), HIDDEN)
            # Query t is at the position of key t + left.
            return jax.vmap(lambda q: kernels.state(q, k, v, bias, left=0, right=self.left + self.right).out)(q)

        return each(one, (heads.q, around))


@dataclasses.dataclass(frozen=True)
class _Summaries(_Form):
    """Each device summarises its part; summaries of all devices, or causally of the previous ones, are joined."""

    method: BoundMethod
    is_causal: bool
    head_dim: int
    block_size: int
    sends_tokens: bool
    by_blocks: bool

    def given(self, arrays: dict[str, Any]) -> _Form:
        given = {name: arrays.get(name, x) for name, x in self.method.hyperparameters.items()}
        return dataclasses.replace(self, method=dataclasses.replace(self.method, hyperparameters=given))

    @property
    def multiple(self) -> int:
        return self.block_size if self.is_causal or self.by_blocks else 1

    def answer(self, heads: _Heads, axis: str) -> Array:
        # Each device samples its own tokens; all devices share one feature map.
        if self.sends_tokens and "key" in heads.drawn and lax.axis_size(axis) > 1:
            own = jax.vmap(jax.random.fold_in, (0, None))(heads.drawn["key"], lax.axis_index(axis))
            heads = heads._replace(drawn={**heads.drawn, "key": own})
        if self.is_causal:
            return self._causal(heads, axis)
        summary = each(lambda args: self._summarize(*args), (heads.k, heads.v, heads.real, heads.drawn))
        whole = _over_all(summary, axis)
        return each(lambda args: jax.vmap(lambda q: attend(q, args[1]).out)(args[0]), (heads.q, whole))

    def space(self, x: Array) -> Array:
        if self.method.registered is None or self.method.registered.running is None:
            return x
        # The space of a summary does not depend on its random numbers, so any key will do.
        running = self.method.running(self.head_dim, jax.random.key(0))
        return running.space(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def _summarize(self, k: Array, v: Array, real: Array, drawn: dict[str, Array]) -> Summary:
        if self.method.registered is None or self.method.registered.summarize is None:
            return self._running(drawn).read(self._state_of_blocks(k, v, real, drawn))
        return self.method.summarize(k, v, kv_mask=real, **drawn)

    def _running(self, drawn: dict[str, Array]) -> RunningSummary:
        return self.method.running(self.head_dim, **drawn)

    def _state_of_blocks(self, k: Array, v: Array, real: Array, drawn: dict[str, Array]) -> Any:
        """The state of the running summary after all blocks."""
        return state_of_blocks(self._running(drawn), Block(*(in_blocks(x, self.block_size) for x in (k, v, real))))

    def _causal(self, heads: _Heads, axis: str) -> Array:
        part, block_size = heads.k.shape[1], self.block_size
        tokens = heads.k, heads.v, heads.real
        halo = jax.tree.map(lambda x: _from_neighbour(x[:, part - block_size :], axis, 1), tokens)
        # A block is summarised when it is no longer the previous one: a device sends its last block as a halo, and the
        # summary of all other blocks.
        sent = jax.tree.map(lambda h, x: jnp.concatenate([h, x[:, : part - block_size]], axis=1), halo, tokens)
        if self.sends_tokens:
            read = lambda args: self._running(args[3]).read(self._state_of_blocks(*args))  # noqa: E731
        else:  # moments continue from those of the previous devices
            read = lambda args: self._state_of_blocks(*args)  # noqa: E731
        earlier = _of_those_before(each(read, (*sent, heads.drawn)), axis)

        def one(args: tuple[_Heads, tuple[Array, Array, Array], Any]) -> Array:
            (q, k, v, real, drawn), halo, earlier = args
            running = self._running(drawn)
            blocks = Block(*(in_blocks(x, block_size) for x in (k, v, real)))

            def query_head(q: Array) -> Array:
                # The halo is block 0, so that it joins the summary after the first block.
                q_blocks = in_blocks(q, block_size)
                if self.sends_tokens:
                    state = out_of_blocks(causal_blocks(running, Block(*halo), 1, q_blocks, blocks))
                    return merge(state, attend(q, earlier)).out
                _, state = scan_blocks(running, Past(Block(*halo), earlier), 1, q_blocks, blocks, part)
                return out_of_blocks(state.out)

            return jax.vmap(query_head)(q)

        return each(one, (heads, halo, earlier))


def _from_neighbour(x: Array, axis: str, offset: int) -> Array:
    """The array of the device ``offset`` places before this one; zeros (false) if there is none."""
    devices = lax.axis_size(axis)
    pairs = [(i, i + offset) for i in range(devices) if 0 <= i + offset < devices]
    return lax.ppermute(x, axis, pairs)


def _over_all(summary: Summary, axis: str) -> Summary:
    """Join the summaries of all devices; arrays have a leading axis of heads."""
    if isinstance(summary, FeatureMoments):
        peak = lax.pmax(lax.stop_gradient(summary.log_scale), axis)
        factor = jnp.exp(summary.log_scale - finite_peak(peak))
        value_sum, mass = lax.psum((summary.value_sum * factor[..., None], summary.mass * factor), axis)
        return FeatureMoments(value_sum, mass, peak, summary.features)
    return _gathered(summary, functools.partial(lax.all_gather, axis_name=axis, axis=1, tiled=True), axis)


def _of_those_before(summary: Summary, axis: str) -> Summary:
    """Join the summaries of all devices before this one."""
    devices, own = lax.axis_size(axis), lax.axis_index(axis)
    if isinstance(summary, FeatureMoments):
        # In log2(p) rounds, each of which doubles the number of joined devices.
        total, reach = _moments_from(summary, axis, 1), 1
        while reach < devices - 1:
            total, reach = jax.vmap(merge)(total, _moments_from(total, axis, reach)), 2 * reach
        return total
    before = (jnp.arange(devices) < own)[:, None, None]

    def gathered(x: Array) -> Array:
        whole = lax.all_gather(x, axis)
        seen = jnp.where(before if x.ndim == 2 else before[..., None], whole, jnp.zeros_like(whole))
        return jnp.moveaxis(seen, 0, 1).reshape(x.shape[0], devices * x.shape[1], *x.shape[2:])

    return _gathered(summary, gathered, axis)


def _gathered(summary: Any, gathered: Callable[[Array], Array], axis: str) -> Any:
    """A summary of tokens, ``[H, M, ...]`` on each device, with those of several: zeros are an absent token."""
    value_range = getattr(summary, "value_range", None)
    if value_range is None:
        return jax.tree.map(gathered, summary)
    tokens = jax.tree.map(gathered, dataclasses.replace(summary, value_range=None))
    low, high = jnp.moveaxis(lax.stop_gradient(value_range), 1, 0)
    return dataclasses.replace(tokens, value_range=jnp.stack([lax.pmin(low, axis), lax.pmax(high, axis)], axis=1))


def _moments_from(moments: FeatureMoments, axis: str, offset: int) -> FeatureMoments:
    """The moments of the device ``offset`` places before this one; empty if there is none."""
    value_sum, mass = (_from_neighbour(x, axis, offset) for x in (moments.value_sum, moments.mass))
    log_scale = _from_neighbour(lax.stop_gradient(moments.log_scale), axis, offset)
    log_scale = jnp.where(lax.axis_index(axis) >= offset, log_scale, -jnp.inf)
    return FeatureMoments(value_sum, mass, log_scale, moments.features)
