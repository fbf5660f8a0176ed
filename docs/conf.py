"""The site: make docs builds it, make docs-links follows its outward links."""

from pathlib import Path

import res2net_jax

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

project = "res2net_jax"
version = release = res2net_jax.__version__
language = "en-GB"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "res2net_jax"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False

autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every reference must resolve, except those to other libraries, whose inventories need a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|jaxtyping|jnp|flax|nnx|np|numpy|PIL|os|pathlib|collections)\..*|ndarray|Array"),
    ("py:.*", r"res2net_jax\.(layers|blocks)\..*"),
]


def add_measurements(app, page, source):
    """Ends the page about speed with what benchmarks/ has measured."""
    if page != "speed":
        return
    for file in sorted(RESULTS.glob("*.txt")):
        source[0] += f"\n### {file.stem}\n\n"
        for chart in (file.with_suffix(".svg"), file.with_suffix(".png")):
            if chart.exists():
                source[0] += f"![{file.stem}](../benchmarks/results/{chart.name})\n\n"
        source[0] += f"```{{literalinclude}} ../benchmarks/results/{file.name}\n:language: text\n```\n"


def shorten_types(app, what, name, obj, options, signature, returned):
    """An array's type by the name that everybody knows it by."""
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returned))


def setup(app):
    app.connect("source-read", add_measurements)
    app.connect("autodoc-process-signature", shorten_types)
