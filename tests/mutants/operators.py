"""The ways to break a kernel: each finds, at a node of the tree, edits of the source.

They follow the common mistakes in such kernels: masks, strides, offsets, accumulators, casts, transposes. They leave
out what the interpreter does not model (``input_precision``, ``num_stages``) and what cannot change a result
(``tl.assume``).
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

from tests.mutants.sites import Edit, Function, Operator, called

OPERATORS: dict[str, Operator] = {}
FAMILIES = (r"\w+_ptr", r"at_\w+", r"stride_\w+", r"rank_\w", r"BLOCK_\w", r"RANK_\w", r"GRAD_\w", r"[MNK]")


def operator(function: Operator) -> Operator:
    """Register an operator under the name of its function."""
    OPERATORS[function.__name__] = function
    return function


def describe(name: str) -> str:
    return (OPERATORS[name].__doc__ or "").strip().rstrip(".")


def _keyword(node: ast.AST, name: str) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call):
        yield from (keyword.value for keyword in node.keywords if keyword.arg == name)


def _number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _binary(node: ast.AST, *kinds: type) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, kinds)


@operator
def mask_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """A mask that is true everywhere."""
    masks = list(_keyword(node, "mask"))
    if isinstance(node, ast.Call):
        masks += [value for name, value in function.arguments(node).items() if name.endswith("mask")]
    for mask in masks:
        yield function.replaced(mask, f"({function.text(mask)}) | True")


@operator
def conjunct_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """One side of ``a & b``."""
    if _binary(node, ast.BitAnd):
        yield function.replaced(node, function.operand(node.left))
        yield function.replaced(node, function.operand(node.right))


@operator
def condition_shortened(function: Function, node: ast.AST) -> Iterator[Edit]:
    """One part of ``a and b`` or ``a or b`` dropped."""
    if isinstance(node, ast.BoolOp):
        joint = " and " if isinstance(node.op, ast.And) else " or "
        for dropped in node.values:
            rest = [value for value in node.values if value is not dropped]
            yield function.replaced(node, f"({joint.join(map(function.text, rest))})")


@operator
def boundary_moved(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``<`` as ``<=`` and the like."""
    signs = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in signs:
        yield function.sign_replaced(node.left, node.comparators[0], *signs[type(node.ops[0])])


@operator
def equality_negated(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``==`` as ``!=``, of numbers known at run time only."""
    signs = {ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in signs and function.text(node.left).islower():
        yield function.sign_replaced(node.left, node.comparators[0], *signs[type(node.ops[0])])


@operator
def strides_swapped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """Two strides exchanged: neighbours in a call, or the two of an offset."""
    if isinstance(node, ast.Call):
        strides = [value for name, value in function.arguments(node).items() if name.startswith("stride_")]
        yield from (function.swapped(*pair) for pair in itertools.pairwise(strides))
    elif _binary(node, ast.Add):
        factors = [side.right for side in (node.left, node.right) if _binary(side, ast.Mult)]
        if len(factors) == 2 and all(function.text(factor).startswith("stride") for factor in factors):
            yield function.swapped(*factors)


@operator
def accumulator_not_carried(function: Function, node: ast.AST) -> Iterator[Edit]:
    """What was summed so far is lost, or what comes is not added."""
    if isinstance(node, ast.AugAssign):
        yield function.replaced(node, "pass")
        target = function.text(node.target)
        yield function.replaced(node, f"{target} = {function.text(node.value)}")
    elif called(node) == "tl.dot" and len(node.args) > 2:
        named = [f"{keyword.arg}={function.text(keyword.value)}" for keyword in node.keywords]
        yield function.replaced(node, f"tl.dot({', '.join([*map(function.text, node.args[:2]), *named])})")
    elif isinstance(node, ast.Call) and "acc" in (arguments := function.arguments(node)):
        yield function.replaced(arguments["acc"], f"tl.zeros_like({function.text(arguments['acc'])})")


@operator
def term_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """One side of ``a + b``, but no pointer, or the second of ``a - b``."""
    if _binary(node, ast.Add, ast.Sub) and not _number(node.left) and not _number(node.right):
        yield function.replaced(node, function.operand(node.left))
        if isinstance(node.op, ast.Add) and "ptr" not in function.text(node.left):
            yield function.replaced(node, function.operand(node.right))


@operator
def one_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """The number of ``1.0 + a`` or ``a - 1``."""
    if _binary(node, ast.Add, ast.Sub):
        sides = [node.left, node.right]
        kept = [side for side in sides if not _number(side)]
        if len(kept) == 1:
            yield function.replaced(node, function.operand(kept[0]))


@operator
def factor_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """One side of ``a * b``, or the divisor: of values, offsets and block numbers."""
    if _binary(node, ast.Mult, ast.Div, ast.FloorDiv):
        yield function.replaced(node, function.operand(node.left))
        if isinstance(node.op, ast.Mult):
            yield function.replaced(node, function.operand(node.right))


@operator
def sign_flipped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``+`` as ``-`` or the other way round, of values: pointers and indices are for others."""
    signs = {ast.Add: ("+", "-"), ast.Sub: ("-", "+")}
    if isinstance(node, ast.AugAssign) and type(node.op) in signs:
        yield function.sign_replaced(node.target, node.value, *signs[type(node.op)])
    elif _binary(node, *signs) and "_ptr" not in function.text(node) and "arange" not in function.text(node):
        yield function.sign_replaced(node.left, node.right, *signs[type(node.op)])


@operator
def cast_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``x.to(...)`` as ``x``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        yield function.replaced(node, function.operand(node.func.value))


@operator
def index_narrowed(function: Function, node: ast.AST) -> Iterator[Edit]:
    """An index of 64 bits in 32."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        target = node.args[0]
        if function.text(target) in ("INDEX", "tl.int64"):
            yield function.replaced(target, "tl.int32")


@operator
def transpose_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``tl.trans(x)`` as ``x``."""
    if called(node) == "tl.trans":
        yield function.replaced(node, function.operand(node.args[0]))


@operator
def axis_changed(function: Function, node: ast.AST) -> Iterator[Edit]:
    """A sum over the other axis."""
    if called(node) in ("tl.sum", "tl.max", "sum_of_products") and len(node.args) > 1:
        axis = node.args[-1]
        if isinstance(axis, ast.Constant):
            yield function.replaced(axis, {"0": "1", "1": "0"}[function.text(axis)])


@operator
def broadcast_changed(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``[:, None]`` as ``[None, :]`` or the other way round."""
    others = {"[:, None]": "[None, :]", "[None, :]": "[:, None]"}
    if isinstance(node, ast.Subscript):
        start, end = function.end(node.value), function.end(node)
        if (text := function.between(start, end)) in others:
            yield start, end, others[text]


@operator
def default_changed(function: Function, node: ast.AST) -> Iterator[Edit]:
    """One where zero is read outside the mask."""
    for value in _keyword(node, "other"):
        yield function.replaced(value, {"0": "1"}.get(function.text(value), "1.0"))


@operator
def division_changed(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``//`` as ``%`` or the other way round, and ``cdiv`` rounded down."""
    signs = {ast.FloorDiv: ("//", "%"), ast.Mod: ("%", "//")}
    if _binary(node, *signs):
        yield function.sign_replaced(node.left, node.right, *signs[type(node.op)])
    elif called(node) == "tl.cdiv":
        yield function.replaced(node, " // ".join(map(function.operand, node.args)))


@operator
def loop_shortened(function: Function, node: ast.AST) -> Iterator[Edit]:
    """A loop without its first turn, and without its last."""
    if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
        first, last, *step = node.iter.args
        by = function.operand(step[0]) if step else "1"
        yield function.replaced(first, f"{function.operand(first)} + {by}")
        yield function.replaced(last, f"{function.operand(last)} - {by}")


@operator
def bound_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """One side of ``min(a, b)``."""
    minimum = isinstance(node, ast.Call) and function.text(node.func) in ("min", "tl.minimum")
    for kept in node.args if minimum else ():
        yield function.replaced(node, function.operand(kept))


@operator
def branches_swapped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``tl.where`` the wrong way round."""
    if called(node) == "tl.where":
        yield function.swapped(*node.args[1:])


@operator
def operand_mistaken(function: Function, node: ast.AST) -> Iterator[Edit]:
    """A parameter taken for its neighbour: another pointer, stride, rank, size, block or offset."""
    if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load) or node.id not in function.parameters:
        return
    family = next((pattern for pattern in FAMILIES if re.fullmatch(pattern, node.id)), None)
    members = [name for name in function.parameters if family and re.fullmatch(family, name)]
    if len(members) > 1:
        yield function.replaced(node, members[(members.index(node.id) + 1) % len(members)])


@operator
def absolute_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``tl.abs(x)`` as ``x``."""
    if called(node) == "tl.abs":
        yield function.replaced(node, function.operand(node.args[0]))


@operator
def number_off_by_one(function: Function, node: ast.AST) -> Iterator[Edit]:
    """An integer in a sum, or a loop's step, one too large."""
    numbers: list[ast.AST] = []
    if _binary(node, ast.Add, ast.Sub):
        numbers = [node.left, node.right]
    elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
        numbers = [*node.iter.args[2:]]
    for number in numbers:
        if isinstance(number, ast.Constant) and type(number.value) is int:
            yield function.replaced(number, str(number.value + 1))


@operator
def start_changed(function: Function, node: ast.AST) -> Iterator[Edit]:
    """Sums that start at one."""
    if called(node) == "tl.zeros":
        shape, kind = node.args[0], node.keywords[0]
        yield function.replaced(node, f"tl.full({function.text(shape)}, 1.0, {function.text(kind.value)})")


@operator
def addend_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """``tl.fma(a, b, c)`` as ``a * b``."""
    if called(node) == "tl.fma":
        yield function.replaced(node, " * ".join(map(function.operand, node.args[:2])))


@operator
def store_dropped(function: Function, node: ast.AST) -> Iterator[Edit]:
    """A result that is not stored."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "store" in function.text(node.value.func):
        yield function.replaced(node, "pass")
