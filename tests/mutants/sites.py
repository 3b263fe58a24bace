"""Where the kernels can be broken: their source as a tree, and edits of its text.

A mutant is identified by its file, function, statement and replaced text, not by line numbers: it survives other edits.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("glora_kernels", "_triton")
KERNEL_FILES = ("tile.py", "assemble.py", "fused.py", "token_pass.py", "weight_pass.py", "contract.py", "finish.py")


def path_of(file: str) -> Path:
    return FOLDER / file if file == "tile.py" else FOLDER / "kernels" / file


Edit = tuple[int, int, str]  # bytes from, to, and the new text
Operator = Callable[["Function", ast.AST], Iterator[Edit]]


@dataclass(frozen=True)
class Mutant:
    """One broken kernel."""

    file: str
    function: str
    operator: str
    statement: str  # on one line
    original: str
    replacement: str
    occurrence: int  # number among mutants that are equal in all of the above
    line: int
    edit: Edit = field(compare=False)

    @cached_property
    def id(self) -> str:
        key = (self.file, self.function, self.operator, self.statement, self.original, self.replacement)
        return hashlib.sha1(repr((*key, self.occurrence)).encode()).hexdigest()[:10]

    @property
    def path(self) -> Path:
        return path_of(self.file)

    def applied(self, source: str) -> str:
        start, end, text = self.edit
        code = source.encode()
        return (code[:start] + text.encode() + code[end:]).decode()

    def diff(self, source: str) -> str:
        lines = (text.splitlines() for text in (source, self.applied(source)))
        return "\n".join(itertools.islice(difflib.unified_diff(*lines, n=0, lineterm=""), 2, None))


class Function:
    """A kernel's function as operators see it: its tree, its text, and the signatures of what it calls.

    Attributes:
        tree: the function's node.
        parameters: their names, in order.
        signatures: the parameters of every function of the kernel files, by name.
    """

    def __init__(self, tree: ast.FunctionDef, source: str, signatures: dict[str, list[str]]) -> None:
        self.tree = tree
        self.code = source.encode()
        self.signatures = signatures
        self.parameters = parameters_of(tree)
        self._starts = [0, *itertools.accumulate(len(line) for line in self.code.splitlines(keepends=True))]

    def start(self, node: ast.AST) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        return self.between(self.start(node), self.end(node))

    def between(self, start: int, end: int) -> str:
        return self.code[start:end].decode()

    def operand(self, node: ast.AST) -> str:
        """The text of a node, in parentheses unless it never needs them."""
        atoms = (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript)
        return self.text(node) if isinstance(node, atoms) else f"({self.text(node)})"

    def replaced(self, node: ast.AST, text: str) -> Edit:
        return self.start(node), self.end(node), text

    def swapped(self, first: ast.AST, second: ast.AST) -> Edit:
        between = self.between(self.end(first), self.start(second))
        return self.start(first), self.end(second), self.text(second) + between + self.text(first)

    def sign_replaced(self, left: ast.AST, right: ast.AST, old: str, new: str) -> Edit:
        """The sign between two operands."""
        start, end = self.end(left), self.start(right)
        return start, end, self.between(start, end).replace(old, new, 1)

    def arguments(self, call: ast.Call) -> dict[str, ast.expr]:
        """The arguments of a call to one of the kernels' own functions, by parameter; empty for other calls."""
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name not in self.signatures:
            return {}
        named = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        return {**dict(zip(self.signatures[name], call.args)), **named}

    def changes(self, edit: Edit) -> bool:
        """Whether an edit leaves valid Python and changes the program."""
        start, end, text = edit
        before, after = self.code[self.start(self.tree) : start], self.code[end : self.end(self.tree)]
        try:
            return ast.dump(ast.parse(before + text.encode() + after).body[0]) != self._dump
        except SyntaxError:
            return False

    @cached_property
    def _dump(self) -> str:
        return ast.dump(ast.parse(self.text(self.tree)).body[0])

    def sites(self) -> Iterator[tuple[ast.stmt, ast.AST]]:
        """Every node that runs, with its statement; without docstrings and hints to the compiler."""
        for statement in _statements(self.tree.body):
            for node in _own_nodes(statement):
                yield statement, node


def parameters_of(tree: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in tree.args.args]


def called(node: ast.AST) -> str:
    """The name of the called function, as ``tl.sum``; empty for anything but a call of a name."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.Expr) and (
            isinstance(statement.value, ast.Constant) or called(statement.value) == "tl.assume"
        ):
            continue
        yield statement
        for block in ("body", "orelse"):
            yield from _statements(getattr(statement, block, []))


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """The statement and its expressions, without the statements inside it and without annotations."""
    yield statement
    for name, value in ast.iter_fields(statement):
        if name not in ("body", "orelse", "annotation"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from ast.walk(child)


def functions(sources: dict[str, str]) -> Iterator[tuple[str, Function]]:
    """Every function of the given files, with the name of its file."""
    trees = {file: _functions(ast.parse(source)) for file, source in sources.items()}
    signatures = {tree.name: parameters_of(tree) for found in trees.values() for tree in found}
    for file, found in trees.items():
        for tree in found:
            yield file, Function(tree, sources[file], signatures)


def _functions(module: ast.Module) -> list[ast.FunctionDef]:
    """The functions that Triton compiles; those that launch them are host code."""
    found = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if any(ast.unparse(name).startswith("triton.jit") for name in node.decorator_list)]


def mutants(sources: dict[str, str], operators: dict[str, Operator]) -> list[Mutant]:
    """All mutants of the given files, without repetition; each is valid Python."""
    found: list[Mutant] = []
    seen: set[tuple] = set()
    alike: Counter[tuple] = Counter()
    for file, function in functions(sources):
        for (statement, node), (name, operator) in itertools.product(function.sites(), operators.items()):
            for edit in operator(function, node):
                if (file, *edit) in seen or not function.changes(edit):
                    continue
                seen.add((file, *edit))
                key = (file, function.tree.name, name, _one_line(function, statement), *_replacement(function, edit))
                found.append(Mutant(*key, alike[key], node.lineno, edit))
                alike[key] += 1
    return found


def _replacement(function: Function, edit: Edit) -> tuple[str, str]:
    start, end, text = edit
    return " ".join(function.between(start, end).split()), " ".join(text.split())


def _one_line(function: Function, statement: ast.stmt) -> str:
    """The text of a statement, or its head if it holds other statements."""
    body = getattr(statement, "body", None)
    end = function.start(body[0]) if body else function.end(statement)
    return " ".join(line.partition("  # ")[0] for line in function.between(function.start(statement), end).split("\n"))


def read_sources(root: Path = ROOT, only: str | None = None) -> dict[str, str]:
    """The kernel files by name."""
    names = [name for name in KERNEL_FILES if only in (None, name)]
    return {name: (root / path_of(name)).read_text() for name in names}
