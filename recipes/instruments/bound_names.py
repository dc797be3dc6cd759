"""Names that a piece of Python reads, and whether anything before binds them."""

from __future__ import annotations

import ast
import builtins
import sys
import textwrap

FORMS = (  # a statement, and what opens a block
    "{}", "{} pass", "{} pass\nfinally: pass", "if 0: pass\n{} pass", "try: pass\n{} pass", "{}\ndef _(): pass",
)  # fmt: skip
KNOWN = {*dir(builtins), *sys.stdlib_module_names, "__file__", "__name__"}


def bound_before(text: str) -> list[int]:
    """Count the names that a function reads, those that nothing has bound, its lines, and those that are Python.

    The header, its first statement, binds names, and is not counted. Statements are read one by one, since a model's
    text is seldom Python throughout.
    """
    lines, known = text.splitlines(), set(KNOWN)
    at, reads, unbound, parsed = 0, 0, 0, 0
    while at < len(lines):
        number, tree = statement(lines[at:])
        if tree is not None:
            names, inner, after = used_and_bound(tree)
            names = names if at else []
            reads += len(names)
            unbound += sum(name not in known | inner for name in names)
            known |= inner | after
            parsed += number
        at += number
    return [reads, unbound, len(lines), parsed]


def statement(lines: list[str]) -> tuple[int, ast.Module | None]:
    """Return the number of lines of the first statement, and its tree: None if the line is no Python.

    A line that opens a block stands with an empty one.
    """
    for number in range(1, min(len(lines), 40) + 1):
        text = textwrap.dedent("\n".join(lines[:number])).strip()
        for form in FORMS:
            try:
                return number, ast.parse(form.format(text))
            except (SyntaxError, ValueError):
                continue
    is_string = any(lines[0].count(quotes) % 2 for quotes in ('"""', "'''"))
    return len(lines) if is_string else 1, None  # a docstring that does not end is no code


def used_and_bound(tree: ast.Module) -> tuple[list[str], set[str], set[str]]:
    """Return the names that a statement reads, those bound within it, and those bound when it is done."""
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    targets = {
        id(name)
        for node in nodes
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in ast.walk(target)
    }
    added = [node.target for node in nodes if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)]
    reads = [name.id for name in (*names, *added) if isinstance(name.ctx, ast.Load) or name in added]
    stored = [name for name in names if isinstance(name.ctx, ast.Store)]
    inner = {name.id for name in stored if id(name) not in targets}
    inner |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    inner |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    inner |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    inner |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return reads, inner, {name.id for name in stored}
