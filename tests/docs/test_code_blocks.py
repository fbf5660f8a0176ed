"""Every code block of the documentation runs, or says why it does not."""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

sys.path.insert(0, str(Path(__file__).parent))

from blocks import Block, blocks, commands, run_python, run_shell  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("train/*.md"), *ROOT.glob("docs/**/*.md")])
BLOCKS = [block for page in PAGES for block in blocks(page)]
NAMES = [f"{block.page.relative_to(ROOT)}:{block.line}" for block in BLOCKS]
# "text" is for what is no code: a tree of files, a table that was printed.
RUN, TEXT = {"python": run_python, "sh": run_shell}, "text"


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_a_block_says_what_it_is(block):
    assert block.language in {*RUN, TEXT}
    assert not (block.language == TEXT and block.reason), "text is never run, and needs no reason"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_blocks_of_a_page_run_in_their_order(page, reader, optimized):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason is None and block.language == "python":
            run_python(block, namespace)
        elif block.reason is None and block.language == "sh":
            run_shell(block)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.reason], ids=[name for name, b in zip(NAMES, BLOCKS) if b.reason]
)
def test_what_is_not_run_exists(block: Block):
    """Extras, targets of make, modules and switches; and files that are said to be in the repository."""
    for command in commands(block):
        for extras in re.findall(r"pip install '(?:\.|res2net_jax)\[([\w,]+)\]'", command):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras.split(",")) <= set(known)
        for target in re.findall(r"^make ([\w./-]+)", command):
            assert re.search(rf"^{target}:|^\.venv/%:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for module, arguments in re.findall(r"python -m ([\w.]+)([^\"&|]*)", command):
            parse(module, shlex.split(arguments, comments=True))


def parse(module, arguments):
    """As the command would do first."""
    from train import config, evaluate, prepare

    if module == "train.imagenet":
        config.parse(arguments, module)
    elif module in ("train.evaluate", "train.prepare"):
        tyro.cli(evaluate.Options if module == "train.evaluate" else prepare.Options, args=arguments)
    else:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() or (ROOT / module).is_dir()
