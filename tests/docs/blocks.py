"""The fenced code blocks of a Markdown page, and how a reader would run them."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

import porting
import res2net_jax

ROOT = Path(__file__).parents[2]
# What a command is given after its own arguments, so that it takes seconds: the trainer takes one step with a few small
# pictures, and porting leaves out the comparison with timm, which tests/porting makes.
SHORTER = {
    "train.imagenet": ["--size", "32", "--batch-size", "4", "--steps", "1", "--workers", "0"],
    "porting": ["--no-verify"],
}


PACKAGES = {"res2net_jax": res2net_jax, "porting": porting}


class Block(NamedTuple):
    """``reason`` is why it is not run, from a comment ``<!-- not run: ... -->`` just before it, or None."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of ``page``, except MyST's directives, whose files are pages of their own."""
    before = None
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        if token.type == "fence" and not token.info.startswith("{"):
            comment = before.content if before is not None and before.type == "html_block" else ""
            reason = re.match(r"<!-- not run: (.+) -->", comment)
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content, reason and reason[1])
        before = token


def run_python(block: Block, namespace: dict) -> None:
    """Executes the statements; a line that is an expression with its value as a comment must have that value."""
    lines, program = block.code.splitlines(), ast.parse(block.code)
    for node in ast.walk(program):
        # This process has imported every module of ours; the reader's has only what the page imports.
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PACKAGES:
            public = PACKAGES[node.value.id].__all__
            assert node.attr in public, f"{block.page}: {node.value.id}.{node.attr} is not public; import it by name"
    for statement in program.body:
        place = f"{block.page}, line {block.line + statement.lineno}"
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), place, "exec"), namespace)
            continue
        value = eval(compile(ast.Expression(statement.value), place, "eval"), namespace)
        comment = lines[statement.end_lineno - 1][statement.end_col_offset :].strip()
        try:
            promised = ast.literal_eval(comment.removeprefix("#").strip())
        except (SyntaxError, ValueError):  # words, or nothing
            continue
        assert value == promised, f"{place}: the comment says {promised!r}; it is {value!r}"


def run_shell(block: Block) -> None:
    """Runs the commands, ``python -m`` in this process, which has imported all that they need."""
    for command in commands(block):
        place = f"{block.page}, in the block of line {block.line}: {command}"
        words = shlex.split(command, comments=True)
        if words[:2] == ["python", "-m"] and not re.search(r"[|<>;&$]", command):
            code = run_module(words[2], words[3:])
        else:
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            code = subprocess.run(
                ["bash", "-ec", command], env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
            ).returncode
        assert code == 0, f"{place}: exit code {code}"


def commands(block: Block) -> list[str]:
    """One string a command, without comments of its own line."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_module(module: str, arguments: list[str]) -> int:
    argv = sys.argv
    shorter = [] if arguments[:1] == ["export"] else SHORTER.get(module, [])
    sys.argv = [module, *arguments, *shorter]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as error:
        return error.code or 0
    finally:
        sys.argv = argv
    return 0
