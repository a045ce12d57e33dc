"""Strict promotion, eight CPU devices, a compilation cache, and the shapes of public signatures checked at run time."""

import itertools
import pathlib
import signal
import threading

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Almost all of a test's time is compilation.
jax.config.update("jax_disable_most_optimizations", True)
# On an accelerator products are rounded by default, by more than most tests allow.
jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# A job that is started in the background has interrupts ignored; tests send them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHECKED = ["approx_attention.api", "approx_attention.core.checks", "approx_attention.methods"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")


_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Lets go of compiled programs when there are many: each maps memory, and Linux grants a process 65530 maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests_done) % 25 == 0 and (not maps.exists() or maps.read_bytes().count(b"\n") > 30_000):
        jax.clear_caches()


@pytest.fixture
def optimized():
    """Programs compiled as users have them, for tests of memory."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def models():
    """JAX as models have it: layers broadcast and promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
