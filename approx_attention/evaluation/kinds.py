"""The tables and figures of each measuring command, for each layer and for all layers."""

from approx_attention.evaluation.figures import (
    draw_compared_layers,
    draw_frontiers,
    draw_plan,
    draw_planned_layers,
)
from approx_attention.evaluation.head_report import (
    draw_heads,
    draw_heads_of_layers,
    heads_markdown,
    heads_over_layers,
    heads_table,
    verdicts_table,
)
from approx_attention.evaluation.layers import compared_over_layers, planned_over_layers
from approx_attention.evaluation.plans import plan_document
from approx_attention.evaluation.runs import Kind
from approx_attention.evaluation.tables import (
    comparison_summary_table,
    comparison_table,
    picks_table,
    plan_summary_table,
    plan_table,
)


def comparison_kind(window_size: int, *, is_padded: bool) -> Kind:
    """The tables and figures of comparisons.

    Args:
        window_size: size of the window beyond which keys count for the far error.
        is_padded: whether some tokens are padding, which adds a footnote.
    """
    return Kind(
        name="compare",
        rows=lambda rows: rows,
        more=lambda rows: {},
        shown=lambda rows, title: [comparison_table(rows, title, window_size, is_padded=is_padded)],
        draw=draw_frontiers,
        over_layers=compared_over_layers,
        summary=lambda results, title: [comparison_summary_table(compared_over_layers(results), title)],
        draw_layers=draw_compared_layers,
    )


def plan_kind() -> Kind:
    """The tables and figures of plans."""
    return Kind(
        name="plan",
        rows=lambda made: made.candidates,
        more=lambda made: {"plan": plan_document(made)},
        shown=lambda made, title: [plan_table(made, title), made.verdict],
        draw=draw_plan,
        over_layers=planned_over_layers,
        summary=lambda plans, title: [
            picks_table(plans, title),
            plan_summary_table(planned_over_layers(plans), title),
        ],
        draw_layers=draw_planned_layers,
    )


def heads_kind(size: int, tolerance: float) -> Kind:
    """The tables, the Markdown and the figures of diagnoses of heads.

    Args:
        size: the window, and the number of keys of the ideal methods.
        tolerance: the requested error.
    """
    return Kind(
        name="heads",
        rows=lambda heads: heads,
        more=lambda heads: {},
        shown=lambda heads, title: [heads_table(heads, title, size, tolerance)],
        draw=lambda heads, title: draw_heads(heads, title, size),
        over_layers=heads_over_layers,
        summary=lambda layers, title: [verdicts_table(heads_over_layers(layers), title)],
        draw_layers=lambda layers, title: draw_heads_of_layers(layers, title, size),
        markdown=lambda layers, titles: heads_markdown(layers, titles, size, tolerance),
    )
