"""Who imports whom: modules in no circle, and serving nothing else of the package, so that a server is light."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from support.paths import REPOSITORY

PACKAGE = REPOSITORY / "torchrec_lma"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Of all that runs at some time: not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Modules of the package. What a package exports is imported from the package."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def test_modules_import_each_other_in_no_circle() -> None:
    """What functions import counts too, but for the package itself, which imports a public name at its first use."""
    graph = {name: imported(nodes(tree)) - {PACKAGE.name} for name, tree in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES) > 50


def test_serving_imports_nothing_else_of_the_package() -> None:
    for name, tree in MODULES.items():
        if name.startswith("torchrec_lma.serving"):
            others = {other for other in imported(ast.walk(tree)) if not other.startswith("torchrec_lma.serving")}
            assert not others, name
