"""``predict --html``: one page that holds everything it shows, a card per picture."""

import base64
import contextlib
import html
import importlib.resources
import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template

from res2net_jax import files
from res2net_jax.commands.outputs import Answer, Write

#: Side of the pictures in the report, in pixels.
SIDE = 224

_CARD = Template(
    """<li class="card" data-name="$name" data-confidence="$confidence" tabindex="-1">
<div class="picture"><img src="$picture" width="224" height="224" alt="$name" loading="lazy">$heat</div>
<h2 title="$path"><span class="folder">$folder</span><span class="file">$file</span></h2>
<ol>$classes</ol>
</li>
"""
)
_HEAT = Template(
    """<img class="heat" src="$picture" width="224" height="224" alt="Where the evidence for $label is">"""
)
_CLASS = Template(
    """<li><span class="label" title="$label">$label</span><span class="percent">$percent</span>"""
    """<span class="bar" style="--share:$share"></span></li>"""
)


@contextlib.contextmanager
def report(
    file: Path,
    title: str,
    names: dict[Path, Path],
    failures: Sequence[str],
    *,
    force: bool = False,
    explained: bool = False,
) -> Iterator[Write]:
    """A card per picture; the page is there at the end.

    The cards wait in a temporary file, so that the memory does not grow with their number.

    Args:
        file: Where to.
        title: Of the page: the model.
        names: What to call each picture.
        failures: A list that at the end holds what was said of each broken picture.
        force: Replace the file.
        explained: The answers hold the evidence as well.
    """
    page = Template(importlib.resources.files("res2net_jax.commands").joinpath("report.html").read_text("utf-8"))
    count = 0
    with files.new_file(file, overwrite=force) as stream, tempfile.TemporaryFile("w+", encoding="utf-8") as cards:

        def write(answer: Answer) -> None:
            nonlocal count
            count += 1
            cards.write(_card(answer, names))

        yield write
        head, tail = page.substitute(
            title=_escape(title),
            count=f"{count:,} picture{'s' * (count != 1)}",
            failures=_failures(failures),
            hidden="" if explained else "hidden",
            cards="\0",
        ).split("\0")
        stream.write(head)
        cards.seek(0)
        shutil.copyfileobj(cards, stream)
        stream.write(tail)


def _card(answer, names):
    path, predictions, picture, heat = answer
    label = predictions[0].label
    return _CARD.substitute(
        name=_escape(str(names[path])),
        folder=_escape("" if names[path].name == str(names[path]) else f"{names[path].parent}/"),
        file=_escape(path.name),
        path=_escape(str(path)),
        confidence=f"{predictions[0].probability:.6f}",
        picture=_data_uri(picture),
        heat="" if heat is None else _HEAT.substitute(picture=_data_uri(heat), label=_escape(label)),
        classes="".join(
            _CLASS.substitute(label=_escape(p.label), percent=f"{p.probability:.1%}", share=f"{p.probability:.4f}")
            for p in predictions
        ),
    )


def _failures(failures):
    if not failures:
        return ""
    items = "".join(f"<li>{_escape(failure)}</li>" for failure in failures)
    noun = "picture" if len(failures) == 1 else "pictures"
    return f"<details><summary>{len(failures):,} {noun} could not be read</summary><ul>{items}</ul></details>"


def _escape(text):
    """For elements and attributes; a byte of a file's name that is no UTF-8 becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8")).replace("\0", "")


def _data_uri(picture):
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
