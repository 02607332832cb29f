"""docs/private_api.md names all that the package touches of other packages' private API, and nothing else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.paths import REPOSITORY

LIBRARY = REPOSITORY / "torchrec_lma"
DOCUMENTED = {"_exit", "_getframe"}  # of Python's own os and sys


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_used(tree: ast.AST) -> Iterator[str]:
    """Attributes, imports, and names in getattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            yield str(node.args[1].value)


def names_defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_the_table_of_private_api_is_complete() -> None:
    trees = {path: ast.parse(path.read_text()) for path in LIBRARY.rglob("*.py") if "protos" not in path.parts}
    used = {path: {name for name in names_used(tree) if is_private(name)} for path, tree in trees.items()}
    own = {name for tree in trees.values() for name in names_defined(tree)}
    touched = {(name, path) for path, names in used.items() for name in names - own - DOCUMENTED}

    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", (REPOSITORY / "docs" / "private_api.md").read_text(), re.MULTILINE)
    said: set[tuple[str, Path]] = set()
    for names, files in rows:
        for name in re.findall(r"`([^`]+)`", names):
            private = next(part for part in reversed(name.split(".")) if is_private(part))
            said |= {(private, LIBRARY / file) for file in re.findall(r"`([^`]+)`", files)}
    assert len(rows) > 5
    assert touched <= said
    assert {(name, path) for name, path in said if name not in used[path]} == set()
