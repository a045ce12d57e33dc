"""Settings of the site; ``make docs`` builds it with warnings as errors."""

import inspect
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# The kernels that execute the guide import the same tree, and optimise little, because their programs run once.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

import matplotlib  # noqa: E402

matplotlib.use("svg")

from docutils import nodes  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from sphinx.errors import NoUri  # noqa: E402

import approx_attention  # noqa: E402
from approx_attention.registry import METHODS  # noqa: E402
from docs import names, pages  # noqa: E402
from tests import public_api  # noqa: E402

project = "approx_attention"
author = "The approx_attention authors"
version = release = approx_attention.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinxcontrib.bibtex",
    "myst_nb",
]
exclude_patterns = ["_build", "measured", "**.ipynb_checkpoints"]
nitpicky = True

default_role = "py:obj"
add_module_names = False
maximum_signature_line_length = 2000
autosummary_generate = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Reference"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

html_theme = "furo"
html_title = "approx_attention"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

METHOD_OF = {f"approx_attention.{names.public_name(method.function)}": name for name, method in METHODS.items()}
# Names of other projects. The site does not link to them, so that it builds without a network.
EXTERNAL = (
    "jax.",
    "jnp.",
    "nnx.",
    "linen.",
    "flax.",
    "optax.",
    "functools.",
    "numpy.",
    "np.",
    "Mapping",
    "collections.",
)


def resolve(app: Sphinx, env, node, contnode):
    """Find a name as a reader of its module would, in any public module; names of other projects stay unchanged."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target.startswith(EXTERNAL):
        return contnode
    domain = env.get_domain("py")
    # A name of an internal module may be documented under a shorter name, and a field with its class.
    last, owner = target.rpartition(".")[2], target.rpartition(".")[0]
    wanted = [target, last] if target.startswith("approx_attention.") else [target, *filter(None, [owner])]
    found = [name for part in wanted for name in domain.objects if f".{name}".endswith(f".{part}")]
    if not found:
        return None
    name = min(found, key=lambda name: (name.count("."), name))
    entry = domain.objects[name]
    try:
        uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    except NoUri:
        return None
    return nodes.reference("", "", contnode, internal=True, refuri=f"{uri}#{entry.node_id}")


def skip_member(app: Sphinx, kind: str, name: str, member, skip: bool, options) -> bool | None:
    """Leave out the generated docstrings of named tuple fields; the Attributes section describes them."""
    return True if (member.__doc__ or "").startswith("Alias for field number") else None


def constructor(app: Sphinx, what: str, name: str, thing, options, signature: str | None, returns):
    """The signature of a Flax module, which its metaclass hides."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters])), None


def defaults_by_name(app: Sphinx, what: str, name: str, thing, options, signature: str | None, returns):
    """The signature with defaults as a reader would write them; decorators may add parameters."""
    if what == "class" and signature is not None and "=<" in signature:
        make = thing.__new__ if issubclass(thing, tuple) else thing.__init__
        return public_api.signature(make, skip_first=True), None
    if what not in ("function", "method") or signature is None or ("<" not in signature and what == "method"):
        return None
    unbound = what == "method" and "self" in inspect.signature(thing).parameters
    return public_api.signature(thing, skip_first=unbound), None


def without_summary(app: Sphinx, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Drop the first sentence of a method's docstring on its page, which starts with it."""
    if app.env.docname == f"methods/{METHOD_OF.get(name)}" and "" in lines:
        del lines[: lines.index("") + 1]


def setup(app: Sphinx) -> None:
    """Make the generated pages before Sphinx reads anything."""
    pages.write()
    app.connect("autodoc-process-docstring", without_summary, priority=400)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-process-signature", defaults_by_name)
