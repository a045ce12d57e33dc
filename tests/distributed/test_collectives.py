"""Bytes between devices: counted in programs written by hand, and closed formulas against compiled programs."""

import pytest

from benchmarks.collectives import compiled_bytes, sent_bytes
from benchmarks.wire import SETTINGS, Sizes, least_length, rounds, sent_by

pytestmark = pytest.mark.all_forms

HEADER = """HloModule jit_f, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

"""
BODIES = """
%inner (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %one = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,2}}
}

%outer (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %again = (s32[], f32[8]) while(%x), condition=%sum, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

"""
LOOP = '%l = (s32[], /*index=1*/f32[8]) while(%x), body=%outer, backend_config={"known_trip_count":{"n":"3"}}'


def program(line, bodies=""):
    return f"{HEADER}{bodies}ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"


def test_loops_count_as_often_as_they_run():
    assert sent_bytes(program(LOOP, BODIES)) == {"collective-permute": 3 * 5 * 8 * 4}
    branch = "%c = f32[8] conditional(%x), branch_computations={%sum, %inner}"
    for unknown in (program(LOOP, BODIES.replace('"known_trip_count":{"n":"5"}', "")), program(branch, BODIES)):
        with pytest.raises(ValueError, match="not known how often the collectives in inner run"):
            sent_bytes(unknown)
    with pytest.raises(ValueError, match="no ENTRY"):
        sent_bytes("module @jit_f {}")


@pytest.mark.parametrize(
    ("line", "kind", "expected"),
    [
        ("%g = f32[4,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}", "all-gather", 3 * 32),
        ("%g = bf16[4,8]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}", "all-gather", 3 * 16),
        ("%g = f32[2,8]{1,0} all-gather(%x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", "all-gather", 32),
        ("%g = (f32[8]{0}, f32[4,8]{1,0}) all-gather-start(%x), replica_groups={}", "all-gather", 3 * 32),
        ("%g = ((f32[8], s8[4]), (f32[4,8], s8[4,4])) all-gather-start(%x, %y), replica_groups={}", "all-gather", 108),
        ("%g = (f32[8]{0}, pred[8]{0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}", "all-reduce", 40),
        ("%g = f64[8]{0} all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%sum", "all-reduce", 96),
        ("%g = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}", "reduce-scatter", 24),
        ("%g = f32[8]{0} all-to-all(%x), replica_groups={{0,1,2,3}}", "all-to-all", 24),
        ("%g = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{3,0}}",
         "collective-permute", 32),
    ],
)  # fmt: skip
def test_bytes_of_each_collective(line, kind, expected):
    assert sent_bytes(program(line)) == {kind: expected}
    assert sent_bytes(program(line.replace("-start(", "-done(").replace(f" {kind}(", " negate("))) == {}


def test_the_busiest_device_counts():
    both = (
        "%a = f32[8] collective-permute(%x), source_target_pairs={{0,1}}\n"
        "  %b = f32[4] collective-permute(%x), source_target_pairs={{1,0}}\n"
        "  %c = f32[4] collective-permute(%x), source_target_pairs={{1,2},{2,3}}"
    )
    assert sent_bytes(program(both)) == {"collective-permute": 32}


ALL = [(*key, devices) for key in SETTINGS for devices in (2, 4, 8)]
FAST = [("exact", False, 4), ("local", False, 2), ("favor", True, 8), ("mean_pool", False, 4), ("mean_value", False, 8)]


@pytest.mark.parametrize(
    ("method", "is_causal", "devices"),
    [*FAST, *(pytest.param(*x, marks=pytest.mark.slow) for x in ALL if x not in FAST)],
)
@pytest.mark.usefixtures("models")
def test_compiled_programs_send_what_the_formulas_say(method, is_causal, devices):
    sizes = Sizes(length=2048, devices=devices, num_kv_heads=3, head_dim=16, value_dim=8)
    settings = SETTINGS[method, is_causal]
    sent = compiled_bytes(method, is_causal, sizes, **settings)
    assert sum(sent.values()) == pytest.approx(sent_by(method, is_causal, sizes, **settings), rel=1e-12)


@pytest.mark.usefixtures("models")
def test_a_length_that_blocks_do_not_divide_is_laid_out_anew():
    sizes = Sizes(length=2104, devices=8, num_kv_heads=3, head_dim=16, value_dim=8)
    settings = SETTINGS["favor", True]
    assert sum(compiled_bytes("favor", True, sizes, **settings).values()) > sent_by("favor", True, sizes, **settings)


def test_rounds_reach_every_device():
    for devices in range(2, 40):
        # The devices whose moments each device has: the one before it, then twice as many in each round.
        known, reach, count = [{i - 1} - {-1} for i in range(devices)], 1, 1
        while any(len(of_those) < i for i, of_those in enumerate(known)):
            known = [x | (known[i - reach] if i >= reach else set()) for i, x in enumerate(known)]
            reach, count = 2 * reach, count + 1
        assert count == rounds(devices)


@pytest.mark.parametrize("key", [("favor", False), ("favor", True), ("mean_pool", True), ("local", True)])
def test_from_the_least_length_on_a_summary_sends_less(key):
    for devices in (8, 64):
        settings = SETTINGS[key]
        length = devices * round(least_length(*key, devices, **settings) / devices)
        for sign in (-1, 1):
            sizes = Sizes(length + sign * 2 * devices, devices)
            less = sent_by(*key, sizes, **settings) < sent_by("exact", key[1], sizes)
            assert less == (sign > 0)
