"""What names stand for in a script that is read, not run."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

Conditions = tuple[ast.expr, ...]

OF_PROCESSES = re.compile(
    r"(?<![a-z_])(world_size|(local_|global_)?rank|(is_|use_)?ddp|(is_)?distributed|num_processes|process_index)(?![a-z])",
    re.IGNORECASE,
)


class Names:
    """Imports, and names that a script binds once, to something written out.

    A name that is bound twice, or is a parameter somewhere, may be anything where it is used, and stands for itself.
    """

    def __init__(self, tree: ast.AST) -> None:
        nodes = list(ast.walk(tree))
        bound = Counter(name for node in nodes for name in _binds(node))
        self._imported: dict[str, str] = {}
        self._values: dict[str, ast.expr] = {}
        for node in nodes:
            self._imported |= _imports(node)
            target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
            target = node.target if isinstance(node, ast.AnnAssign) else target
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(target, ast.Name) and value is not None and bound[target.id] == 1:
                self._values[target.id] = value

    def value(self, expression: ast.expr) -> ast.expr:
        """What a name was bound to; any other expression itself."""
        seen: set[str] = set()
        while isinstance(expression, ast.Name) and expression.id in self._values and expression.id not in seen:
            seen.add(expression.id)
            expression = self._values[expression.id]
        return expression

    def dotted(self, expression: ast.expr) -> str:
        """The full name of a function or module; empty for what is no name."""
        parts: list[str] = []
        expression = self.value(expression)
        while isinstance(expression, ast.Attribute):
            parts.append(expression.attr)
            expression = expression.value
        if not isinstance(expression, ast.Name):
            return ""
        return ".".join([self._imported.get(expression.id, expression.id), *reversed(parts)])


def walk(node: ast.AST, conditions: Conditions = ()) -> Iterator[tuple[ast.AST, Conditions]]:
    """Every node that may run, with the conditions that it stands under: notebooks keep examples under `if False`."""
    yield node, conditions
    never = (
        node.body if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value else []
    )
    for child in ast.iter_child_nodes(node):
        if child in never:
            continue
        under = isinstance(node, ast.If | ast.IfExp) and child is not node.test
        yield from walk(child, (*conditions, node.test) if under else conditions)  # type: ignore[attr-defined]


def asks_for_processes(conditions: Conditions) -> bool:
    """Whether one of them looks at how many processes there are, or which this one is."""
    return any(OF_PROCESSES.search(ast.unparse(test)) for test in conditions)


def _imports(node: ast.AST) -> dict[str, str]:
    """Name in the script -> dotted name that it stands for."""
    if isinstance(node, ast.Import):
        first = {alias.name.partition(".")[0]: alias.name.partition(".")[0] for alias in node.names if not alias.asname}
        return first | {alias.asname: alias.name for alias in node.names if alias.asname}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {}


def _binds(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, _NAMED):
        if node.name:
            yield node.name
    else:
        yield from _imports(node)


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
