"""Counting in the text of compiled programs, and the cases that are compiled for accelerators."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from approx_attention.kernels import mosaic
from benchmarks import (
    compiled,
    compiled_report,
    files,
    kernel_dumps,
    kernel_programs,
    kernels,
    kernels_report,
    report,
    sparse_patterns,
    tensor,
)
from benchmarks.ahead_of_time import Case
from benchmarks.hlo import Loop, computations, counted

pytestmark = pytest.mark.all_forms

PROGRAM = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

%inner (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]{0:T(256)}) parameter(0)
  %first = f32[8]{0:T(256)} get-tuple-element(%x), index=1
  %sort.1 = (f32[8]{0:T(256)}, /*index=1*/s32[8]{0}) sort(%first, %first), dimensions={0}, to_apply=%sum
  %call = f32[8]{0} custom-call(%first), custom_call_target="qr", called_computations={%sum}
  ROOT %t = (s32[], f32[8]) tuple(%x)
}

%outer (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum
  ROOT %again = (s32[], f32[8]) while(%x), condition=%sum, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

%once (x: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} copy(%x)
}

"""
LOOP = "%l = (s32[], /*index=1*/f32[8]{0:T(8,128)}) while(%x), condition=%sum, body=%outer"
THREE = ', backend_config={"known_trip_count":{"n":"3"}}'


def program(*lines):
    return PROGRAM + "ENTRY %main (x: f32[8]) -> f32[8] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_operations_in_sequence_count_as_often_as_their_loops_run():
    counts = counted(program("%y = f32[8]{0} copy(%x)", LOOP + THREE))
    assert counts.operations == 1 + 3 * (1 + 5 * 2)
    assert counts.loops == (Loop(0, 3, 11), Loop(1, 5, 2))
    assert counts.custom_calls == {"qr": 1}


def test_a_loop_of_unknown_trips_counts_once():
    counts = counted(program(LOOP))
    assert counts.operations == 11
    assert counts.loops[0] == Loop(0, None, 11)


def test_of_the_branches_the_longest_counts():
    branches = "%c = f32[8] conditional(%i, %x, %x), branch_computations={%once, %outer}"
    chosen = "%c = f32[8] conditional(%p, %x, %x), true_computation=%once, false_computation=%outer"
    assert counted(program(branches)).operations == counted(program(chosen)).operations == 11
    assert counted(program("ROOT %c = f32[8] call(%x), to_apply=%outer")).operations == 11


def test_reading_the_text_of_no_compiled_program_raises():
    assert computations(program(LOOP))[0] == "main"
    with pytest.raises(ValueError, match="no ENTRY"):
        counted("module @jit_f {}")


def test_the_count_of_a_program_of_this_machine():
    @jax.jit
    def function(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jax.lax.fori_loop(0, 3, lambda j, x: jnp.cos(x) @ x, x), x)

    text = function.lower(jnp.ones((8, 8))).compile().as_text()
    assert {(loop.depth, loop.trips) for loop in counted(text).loops} >= {(0, 7)}
    assert counted(text).operations >= 7 * 3


# The cases


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_cases_are_told_apart_and_read_back(platform):
    cases = [dataclasses.asdict(case) for case in compiled.cases(platform)]
    assert all(Case(**json.loads(json.dumps(case))) == Case(**case) for case in cases)
    assert len({json.dumps(case, sort_keys=True) for case in cases}) == len(cases)


def test_rows_of_the_same_code_are_kept_and_an_error_is_a_row(monkeypatch, tmp_path):
    asked = [Case("gpu", name, 8) for name in ("favor", "eva", "exact")]
    calls, written = [], []

    def apart(case, *_):
        calls.append(case.method)
        return {"error": "no"} if case.method == "eva" else {"operations": 1, "loops": []}

    monkeypatch.setattr(compiled, "cases", lambda platform: asked)
    monkeypatch.setattr(compiled, "_compiled_apart", apart)
    monkeypatch.setattr(compiled, "_versions", lambda *asked: {"jax": "0"})
    known = {}
    for source, methods, expected in (
        ("x = 1", ["eva"], ["eva"]),
        ("x = 1", [], ["favor", "exact"]),
        ("x = 2", ["favor"], ["favor"]),
    ):
        package = tmp_path / "approx_attention"
        package.mkdir(exist_ok=True)
        (package / "one.py").write_text(source)
        compiled.measure("gpu", tmp_path / "python", tmp_path, known, written.append, methods=methods)
        assert calls == expected
        calls.clear()
        known = json.loads(json.dumps(written[-1]))
    assert [row["case"]["method"] for row in known["rows"]] == ["favor", "eva", "exact"]
    assert known["rows"][1]["error"] == "no"
    assert [row["code"] == known["code"] for row in known["rows"]] == [True, False, False]


def test_what_ends_a_process_is_the_error_of_its_case(tmp_path):
    python = tmp_path / "python"
    for script, error in (("echo why >&2; exit 3", "ended with 3: why"), ("exec sleep 60", "not compiled within")):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        limit = 30 if "exit" in script else 0.2
        assert error in compiled._compiled_apart(Case("gpu", "favor", 8), python, tmp_path, limit)["error"]
    with pytest.raises(RuntimeError, match="make aot"):
        compiled._versions(python.with_name("absent"), "libtpu")


def test_the_report_shows_what_was_before_beside_what_is_now_and_every_error():
    def document(state, *rows):
        return {
            "code": state,
            "environment": {"jax-cuda12-plugin": "1.2"},
            "rows": [{"code": state, **x} for x in rows],
        }

    def row(operations, trips, **chosen):
        case = dataclasses.asdict(Case("gpu", "favor", 32768, is_causal=True, **chosen))
        return {"case": case, "operations": operations, "temp_bytes": 2**20, "input_bytes": 2**19, **trips}

    known, unknown = ({"loops": [{"depth": 0, "trips": trips, "operations": 1}]} for trips in (4, None))
    failed = {"case": dataclasses.asdict(Case("gpu", "eva", 2048, least_effort=True)), "error": "no room"}
    documents = {
        "compiled_gpu": document("now", row(47, unknown), row(12, known, backend="gpu"), failed),
        "compiled_gpu_before": document("old", row(67715, known, batch=2), row(67750, known)),
    }
    text = "\n".join(compiled_report.section(documents))
    favor = next(line for line in text.splitlines() if line.startswith("| `favor`"))
    assert [cell.strip() for cell in favor.split("|")[2:6]] == ["67750", ">= 47", "<= 150", ""]
    assert "1 (2.0x)" in text
    assert "- `eva`, H200 (sm_90a), forward, now: no room" in text
    assert "jax-cuda12-plugin 1.2" in text
    assert "earlier code" not in text
    documents["compiled_gpu"]["code"] = "newer"
    assert "3 of these rows are of earlier code" in "\n".join(compiled_report.section(documents))


# Programs of the fused kernels

SCHEDULE = """
LB: loop body

     0   :  { %s1 = inlined_call_operand.vmem [shape: bf16[128,1024]] }
   0x1 LB: > { %s2 = sphi %s1  ;;  %9 = sbr.rel (%p1) target = $region4 }
   0x2   : > { %10 = vxpose.xlu0.b32.start [1/16] %v1 }
   0x3   : > { %11 = vxpose.xlu0.b32.end [16/16] %v2 }
   0x4 PF: > { %v3 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %v4 = vmatmul.bf16.gmra.mxu1 %v1 }
   0x5   : >> { %v5 = vpop.f32.mrf.mxu0 }
   0x6   :  {}
   0x7   : > { %14 = sbr.rel (!%p2) target = $region8 }
   0x8   : > { %v6 = vld [vmem:[%s1] sm:$0xff] }
   0x9   : > { %v7 = vxpose.xlu0.b32.start [1/16] %v6 }
   0xa   : > { %v8 = vxpose.xlu0.b32.cont [2/16] %v6 }
   0xb   : > { %v9 = vxpose.xlu0.b32.cont [3/16] %v6 }
   0xc   : > { %va = vxpose.xlu0.b32.end [4/16] %v6 }
   0xd PF: > { %15 = vsyncadd %s1 }
"""
VMEM = """<script>
        const DATA ={"hlo_breakdowns": {
  "copy.1": {"blocks": [], "total_size": 9},
  "vmap_attention_d_keys_.1": {"blocks": [{"allocations": [{"size": 8, "tag": "window"}, {"size": 2, "tag": "SPILL"}]}],
    "total_size": 10}}};
        const title = DATA.global_info;
</script>"""
PTXAS = """ptxas info    : Compiling entry function '_d_keys_kernel' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 231 registers, used 1 barriers"""
LAUNCHES = """002: kCustomKernel _d_keys_kernel grid: [32, 8, 1] threads: [256, 1, 1]  shared_memory: 164864 bytes
003: kCustomKernel wrapped_convert_1 grid: [32, 1, 1] threads: [256, 1, 1]  shared_memory: 0 bytes"""


def test_the_body_of_a_tile_is_the_region_with_the_products_and_not_the_longest():
    assert kernel_dumps.schedule_of(SCHEDULE) == {"bundles": 4, "step_bundles": 3}
    with pytest.raises(ValueError, match="no matrix product"):
        kernel_dumps.schedule_of("   0x1   : > { %s2 = sphi %s1 }")


def test_files_of_a_dump_are_those_of_the_kernels(tmp_path, monkeypatch):
    name = "12-vmap_attention_d_keys_.1"
    (tmp_path / f"{name}-01-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / f"{name}-00-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    (tmp_path / "12-TLP-02-vmem_report.html").write_text(VMEM)
    memory = {"vmem_bytes": 10, "spill_bytes": 2}
    assert kernel_dumps.of_tpu(tmp_path, is_full=False) == {"d_keys": memory}
    assert kernel_dumps.of_tpu(tmp_path, is_full=True) == {"d_keys": memory | {"bundles": 4, "step_bundles": 3}}
    (tmp_path / "m.thunk_sequence.txt").write_text(LAUNCHES)
    (tmp_path / "m.1.ptx").write_text(".visible .entry _d_keys_kernel(\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernel_dumps.of_gpu(tmp_path) == {"d_keys": {"shared_bytes": 164864}}
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(f"#!/bin/sh\n/bin/cat >&2 <<'END'\n{PTXAS}\nEND\n")
    ptxas.chmod(0o755)
    assert kernel_dumps.of_gpu(tmp_path)["d_keys"] == {"shared_bytes": 164864, "registers": 231, "spill_bytes": 12}


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_cases_of_kernels_are_told_apart_and_read_back(platform):
    cases = [json.dumps(dataclasses.asdict(case), sort_keys=True) for case in kernels.cases(platform)]
    assert len(set(cases)) == len(cases)
    assert all(
        json.dumps(dataclasses.asdict(kernel_programs.Case(**json.loads(case))), sort_keys=True) == case
        for case in cases
    )


def test_the_search_starts_from_the_default_tiles():
    assert (kernels.FORWARD_TILES[0], kernels.BACKWARD_TILES[0]) == tuple(map(tuple, mosaic.TILES))


def test_the_report_says_what_was_asked_of_the_kernels_and_what_came():
    def row(platform, backward, **chosen):
        case = kernel_programs.Case(
            platform, "v5e" if platform == "tpu" else "H200", 4096, 128, backward=backward, **chosen
        )
        shared = {"spill_bytes": 2**20, "vmem_bytes": 5 * 2**20, "shared_bytes": 2**15}
        figures = {"registers": 99, "bundles": 4608, "step_bundles": 77} | shared
        default = {name: tile._asdict() for name, tile in mosaic.TILES._asdict().items()}
        names = kernels_report.KERNELS if backward else kernels_report.KERNELS[:1]
        result = {
            "tiles": default,
            "compiler_seconds": 1.5,
            "temp_bytes": 2**20,
            "kernels": dict.fromkeys(names, figures),
        }
        return {"case": json.loads(json.dumps(dataclasses.asdict(case))), "code": "now", **result}

    failed = row("tpu", False, tiles=[[512, 1024, 512], kernels.BACKWARD_TILES[0]]) | {"error": "no room"}
    documents = {
        "tpu": {"code": "now", "environment": {"libtpu": "1.2"}, "rows": [row("tpu", True), failed]},
        "gpu": {"code": "newer", "environment": {}, "rows": [row("gpu", True)]},
    }
    text = "\n".join(kernels_report.section(documents))
    assert "libtpu 1.2" in text
    assert "Result: 4.50 forward (as asked) and 18.00 for the gradient (more than asked)" in text
    assert "77, 77, 77" in text
    assert "1.5, 1, 5.0" in text
    assert "99, 1048576, 32" in text
    assert "1 of these rows are of earlier code" in text
    assert "- v5e, n = 4096, d = 128, bfloat16, tiles [[512, 1024, 512], [1024, 512, 512]]: no room" in text


def test_forms_over_retrieved_keys_and_trees_are_programs_with_rows_in_the_report():
    tokens = [jax.ShapeDtypeStruct((1, 200, 8, 64), jnp.float32)] * 3
    for form in sparse_patterns.retrieval_forms().values():
        assert jax.eval_shape(form, *tokens).shape == (1, 200, 8, 64)
    for form, _ in tensor.all_forms().values():
        assert jax.eval_shape(tensor.with_gradient(form), *tensor.inputs(24, 8))[0].shape == (24, 8)

    measured = json.loads((files.RESULTS / "sparse_patterns.json").read_text())
    blocks = [row for row in measured["rows"] if row["arm"] == "blocks"]
    own = [row | {"arm": arm} for arm in sparse_patterns.retrieval_forms() for row in blocks]
    document = measured | {"retrieved": sparse_patterns.RETRIEVED, "rows": [*measured["rows"], *own]}
    text = "\n".join(report._sparse_patterns_section(document))
    assert all(f"`{name}` ({count})" in text for name, count in sparse_patterns.RETRIEVED.items())
    measured = json.loads((files.RESULTS / "tensor.json").read_text())
    own = [row | {"arm": "tree exact"} for row in measured["rows"] if row["arm"] == "exact"]
    text = "\n".join(report._tensor_section(measured | {"rows": [*measured["rows"], *own]}))
    assert "`tree exact`, with gradients" in text
