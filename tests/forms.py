"""The platform form that is traced: most tests run on CPUs and trace that form alone.

The forms of all platforms together take twice the time to trace. Tests of programs for several platforms have the
marker ``all_forms``; tests/contract/test_executions.py compares the forms.
"""

import contextlib

import jax

# Part of the key of JAX's caches, so that a trace of one form is never used for another.
FORM = jax.make_user_context(default_value="all")
_of_all_platforms = jax.lax.platform_dependent


class _Anew:
    """A request for a form: no two requests are equal, so no earlier trace is found."""

    def __init__(self, form):
        self.form, self.choices = form, []


def _chosen(*operands, **forms):
    asked = FORM.value
    if asked == "all":
        return _of_all_platforms(*operands, **forms)
    if isinstance(asked, _Anew):
        asked.choices.append(forms[asked.form])
        asked = asked.form
    return forms[asked](*operands)


def install():
    """Let `FORM` choose the form for the rest of the process."""
    jax.lax.platform_dependent = _chosen


@contextlib.contextmanager
def one_form(form):
    """Trace the form for CPUs, ``"cpu"``, or for other platforms, ``"default"``, again; yields where it was chosen."""
    asked = _Anew(form)
    with FORM(asked):
        yield asked.choices
