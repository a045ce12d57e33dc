"""The commands that plan a whole model and check a policy: their files and texts."""

import pathlib
from collections.abc import Mapping
from typing import Any

from approx_attention.core import InputError
from approx_attention.evaluation.files import Layer
from approx_attention.evaluation.model_plans import plan_model
from approx_attention.evaluation.policies import Policy
from approx_attention.evaluation.policy_checks import check_policy
from approx_attention.evaluation.policy_reports import (
    check_document,
    check_verdict,
    draw_policy,
    plan_document_of_model,
    plan_verdict,
    policy_markdown,
    policy_table,
)
from approx_attention.evaluation.results import finite, write_results
from approx_attention.evaluation.runs import Task, shown_name
from approx_attention.evaluation.terminal import progress, say


def run_model_plan(task: Task, to: pathlib.Path, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Plan all layers of a task together, and write the policy, its errors and their map.

    Args:
        task: the layers and the output directory.
        to: the file of the policy.
        settings: settings of the run for the JSON file.
        options: arguments of `plan_model`.

    Raises:
        InputError: the file of the policy cannot be written, or `plan_model` raises.
    """
    if to.is_dir() or not to.parent.is_dir():
        reason = "it is a directory" if to.is_dir() else "its directory does not exist"
        raise InputError(f"cannot write {to}: {reason}")
    with progress() as on_progress:
        made = plan_model(task.layers, **options, on_progress=on_progress)
    columns = {"policy": made.errors}
    if made.uniform is not None:
        columns = {f"all heads {made.uniform}": made.uniform_errors, **columns}
    written = _write(task.out, "plan", made.policy, plan_document_of_model(made, settings), columns, plan_verdict(made))
    made.policy.save(to)
    say(policy_table(made.policy, made.errors, task.over_layers), plan_verdict(made))
    say(f"wrote {to} and {' and '.join(map(str, written))}")


def run_policy_check(
    out: pathlib.Path,
    policy: Policy,
    layers: Mapping[str, Layer],
    source: str,
    settings: Mapping[str, Any],
    **options: Any,
) -> None:
    """Check a policy on layers, and write its errors and their map.

    Args:
        out: the output directory.
        policy: the policy to check.
        layers: layers as for `check_policy`.
        source: the name of the file.
        settings: settings of the run for the JSON file.
        **options: arguments of `check_policy`.
    """
    with progress() as on_progress:
        check = check_policy(policy, layers, **options, on_progress=on_progress)
    columns = {"planned text": check.promised, "this text": check.errors}
    written = _write(out, "check", policy, check_document(check, settings), columns, check_verdict(check))
    say(policy_table(policy, check.errors, shown_name(source)), check_verdict(check))
    say(f"wrote {' and '.join(map(str, written))}")


def _write(
    out: pathlib.Path, name: str, policy: Policy, document: dict[str, Any], columns: Mapping[str, Any], verdict: str
) -> list[pathlib.Path]:
    """Write NAME.json, NAME.md, and if possible NAME.png."""
    text = f"{verdict}\n\n{policy_markdown(policy, columns)}\n"
    title = f"relative error by layer and key head, tolerance {policy.tolerance:g}"
    written, no_figure = write_results(out, name, finite(document), lambda: draw_policy(policy, columns, title), text)
    if no_figure:
        say(f"no figure: {no_figure}")
    return written
