"""Stated rules of style for Python code. Pure: the code is parsed, not run."""

import ast
from collections.abc import Callable, Iterator

LONGEST_FUNCTION = 40
MOST_BRANCHES = 10

_BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.BoolOp, ast.IfExp, ast.comprehension, ast.match_case)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def style_score(code: str) -> float:
    """Return the share of `RULES` that the code keeps; 0 if it does not parse."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return 0.0
    return sum(keeps(tree) for keeps in RULES.values()) / len(RULES)


def _functions(tree: ast.Module) -> Iterator[_Function]:
    return (node for node in ast.walk(tree) if isinstance(node, _Function))


def _parameters(function: _Function) -> list[ast.arg]:
    arguments = function.args
    return [
        one
        for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        if one.arg not in ("self", "cls")
    ]


def _is_annotated(tree: ast.Module) -> bool:
    return all(
        (function.returns is not None or function.name == "__init__")
        and all(one.annotation is not None for one in _parameters(function))
        for function in _functions(tree)
    )


def _is_documented(tree: ast.Module) -> bool:
    public = [node for node in tree.body if isinstance(node, _Function) and not node.name.startswith("_")]
    return all(ast.get_docstring(function) for function in public)


def _catches_narrowly(tree: ast.Module) -> bool:
    """Return whether no handler catches everything and does nothing about it, or is bare."""
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    return not any(
        handler.type is None or (_is_broad(handler.type) and all(isinstance(step, ast.Pass) for step in handler.body))
        for handler in handlers
    )


def _is_broad(caught: ast.expr) -> bool:
    return isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException")


def _has_no_shared_default(tree: ast.Module) -> bool:
    return not any(
        isinstance(default, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
        for function in _functions(tree)
        for default in (*function.args.defaults, *function.args.kw_defaults)
    )


def _is_short(tree: ast.Module) -> bool:
    return all((function.end_lineno or 0) - function.lineno < LONGEST_FUNCTION for function in _functions(tree))


def _is_simple(tree: ast.Module) -> bool:
    return all(
        sum(isinstance(node, _BRANCHES) for node in ast.walk(function)) <= MOST_BRANCHES
        for function in _functions(tree)
    )


def _uses_what_it_binds(tree: ast.Module) -> bool:
    """Return whether every import and every plain local assignment is read somewhere."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for function in _functions(tree):
        bound |= {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    shared = {name for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
    return all(name in used or name in shared or name.startswith("_") for name in bound)


def _has_no_dangerous_call(tree: ast.Module) -> bool:
    return not any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile")
        for node in ast.walk(tree)
    )


RULES: dict[str, Callable[[ast.Module], bool]] = {
    "annotated": _is_annotated,
    "documented": _is_documented,
    "no bare or silent except": _catches_narrowly,
    "no mutable default": _has_no_shared_default,
    "functions of at most 40 lines": _is_short,
    "at most 10 branches": _is_simple,
    "nothing unused": _uses_what_it_binds,
    "no eval or exec": _has_no_dangerous_call,
}
"""The rules by name, as docs/compare.md lists them."""
