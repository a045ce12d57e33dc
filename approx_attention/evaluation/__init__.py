"""Errors and times of methods on your tensors: comparisons, plans, head diagnoses, and their tables and figures."""

from approx_attention.evaluation.arms import BASELINES, LARGEST_LOGITS, default_methods, method_arm
from approx_attention.evaluation.atomic import write_atomically
from approx_attention.evaluation.cache_bytes import held_bytes
from approx_attention.evaluation.capabilities import capability_table
from approx_attention.evaluation.comparison import Comparison, compare, run_comparison
from approx_attention.evaluation.errors import OutputError, output_error, skill
from approx_attention.evaluation.figures import draw_frontiers, draw_plan, figure_style, light_grid, method_styles
from approx_attention.evaluation.files import (
    Layer,
    Tensors,
    load_layers,
    load_sample,
    load_tensors,
    sample_layers,
    save_layers,
)
from approx_attention.evaluation.heads import HeadDiagnosis, diagnose
from approx_attention.evaluation.kinds import comparison_kind, heads_kind, plan_kind
from approx_attention.evaluation.measurement import Measurement
from approx_attention.evaluation.model_plans import ModelPlan, plan_model
from approx_attention.evaluation.planning import plan
from approx_attention.evaluation.plans import Candidate, Curve, Plan, plan_document
from approx_attention.evaluation.policies import HeadChoice, LayerPolicy, Policy, stack_of
from approx_attention.evaluation.policy_checks import PolicyCheck, check_policy
from approx_attention.evaluation.policy_reports import draw_policy
from approx_attention.evaluation.policy_runs import run_model_plan, run_policy_check
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.programs import Arm, compile_arm, shared_programs
from approx_attention.evaluation.results import environment
from approx_attention.evaluation.runs import Interrupted, OnProgress, Task, only_run, run
from approx_attention.evaluation.spectra import Spectrum, spectrum
from approx_attention.evaluation.tables import comparison_table, markdown_table, plan_table
from approx_attention.evaluation.terminal import outputs, terminable
from approx_attention.evaluation.timing import Timing, break_even, time_interleaved
from approx_attention.evaluation.worst_query import SupError, sup_error

__all__ = [
    "BASELINES",
    "LARGEST_LOGITS",
    "Arm",
    "Candidate",
    "Comparison",
    "Curve",
    "HeadChoice",
    "HeadDiagnosis",
    "Interrupted",
    "Layer",
    "LayerPolicy",
    "Measurement",
    "ModelPlan",
    "OnProgress",
    "OutputError",
    "Plan",
    "Policy",
    "PolicyCheck",
    "Problem",
    "Spectrum",
    "SupError",
    "Task",
    "Tensors",
    "Timing",
    "break_even",
    "capability_table",
    "check_policy",
    "compare",
    "comparison_kind",
    "comparison_table",
    "compile_arm",
    "default_methods",
    "diagnose",
    "draw_frontiers",
    "draw_plan",
    "draw_policy",
    "environment",
    "figure_style",
    "heads_kind",
    "held_bytes",
    "light_grid",
    "load_layers",
    "load_sample",
    "load_tensors",
    "markdown_table",
    "method_arm",
    "method_styles",
    "only_run",
    "output_error",
    "outputs",
    "plan",
    "plan_document",
    "plan_kind",
    "plan_model",
    "plan_table",
    "run",
    "run_comparison",
    "run_model_plan",
    "run_policy_check",
    "sample_layers",
    "save_layers",
    "shared_programs",
    "skill",
    "spectrum",
    "stack_of",
    "sup_error",
    "terminable",
    "time_interleaved",
    "write_atomically",
]
