"""Strict promotion, eight CPU devices, a compilation cache, and run-time checks of the shapes in public signatures."""

import gc
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jaxtyping
import pytest

from tests import forms

# Almost all of a test's time is compilation. These flags cut it to a third; the programs run slower.
QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def _compile_quickly():
    # XLA ends the process on an unknown flag, and versions differ: a separate process tries each flag.
    parse = "import jaxlib.xla_client as xla; xla.CompileOptions().executable_build_options.debug_options"
    for flag in QUICK:
        flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}
        tried = subprocess.run([sys.executable, "-c", parse], env=os.environ | flags, capture_output=True, check=False)
        if tried.returncode == 0:
            os.environ.update(flags)


# Workers of pytest-xdist inherit the environment of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compile_quickly()
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
# On an accelerator matrix products are rounded by default, by more than most tests allow.
jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Filtering takes most of the time of an expected error.
jax.config.update("jax_traceback_filtering", "off")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Interrupts are ignored in a background job, but some tests send them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

forms.install()

CHECKED = ["approx_attention.api", "approx_attention.core.checks", "approx_attention.methods"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def rare_collections():
    """Collect garbage rarely: traces make many small objects, and collection would take a fifth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def form_for_cpus(request):
    """Trace the form for CPUs alone, except in tests with the marker ``all_forms``."""
    with forms.FORM("all" if request.node.get_closest_marker("all_forms") else "cpu"):
        yield


_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Drop compiled programs when there are many: each maps memory, and Linux allows a process 65530 maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests_done) % 25 == 0 and (not maps.exists() or maps.read_bytes().count(b"\n") > 50_000):
        jax.clear_caches()


@pytest.fixture
def traced_anew():
    """Clear all traces, when called and at the end."""
    yield jax.clear_caches
    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """Tests that clear traces run last, because the others share them."""
    items.sort(key=lambda item: "traced_anew" in getattr(item, "fixturenames", ()))


@pytest.fixture
def optimized():
    """Compile programs with the usual optimisations, for tests of memory; yields the compiler options."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield {"xla_cpu_use_fusion_emitters": True} if QUICK[0] in os.environ.get("XLA_FLAGS", "") else {}
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def models():
    """Allow the usual promotion of JAX, which the layers of models need."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """Enable float64 during a test."""
    with jax.enable_x64(True):
        yield
