"""The site: built without a warning, with every public name and every command on it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import porting
import res2net_jax

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning fails it, so does a reference or an anchor that leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_public_name_is_described(site):
    from sphinx.util.inventory import InventoryFile

    with open(site / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    described = {name for kind in inventory if kind.startswith("py:") for name in inventory[kind]}
    public = {f"{module.__name__}.{name}" for module in (res2net_jax, porting) for name in module.__all__}
    assert public <= described


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("train/*.md")], ids=lambda page: page.name)
def test_links_between_files_hold(page):
    """Those of the site are Sphinx's business."""
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        for child in token.children or ():
            link = child.attrs.get("href") or child.attrs.get("src") or ""
            if link and not link.startswith(("http", "#")):
                assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_what_is_named_within_a_text_is_there_after_the_import():
    texts = [
        path.read_text("utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("train/*.md"), *ROOT.glob("docs/*.md"))
    ]
    names = {name for text in texts for name in re.findall(r"`(res2net_jax(?:\.\w+)+)\(", text)}
    assert "res2net_jax.groups.layer_scales" in names
    program = f"import res2net_jax\nfor name in {sorted(names)}: eval(name)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_described():
    from res2net_jax.__main__ import COMMANDS

    page = (ROOT / "docs" / "command-line.md").read_text()
    assert [name for name in COMMANDS if f"`python -m res2net_jax {name}`" not in page] == []


def test_files_of_the_design_exist():
    rows = [line for line in (ROOT / "docs" / "design.md").read_text().splitlines() if line.startswith("|")]
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", "\n".join(rows)))
    packages = ("res2net_jax", "porting", "train")
    assert {name for name in named if not any((ROOT / folder / name).exists() for folder in (".", *packages))} == set()


def test_every_page_is_in_the_table_of_contents(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    index = (site / "index.html").read_text()
    assert not [page for page in pages if f'href="{page}"' not in index and page.name != "index.html"]
