"""A tool for rollouts of several turns: it computes what the student writes between <calc> and </calc>."""

import ast
import operator
import re

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def answer(messages: list[dict], row: dict) -> str | None:
    """Return the results of the last turn's calculations; None, which ends the rollout, if it has none."""
    expressions = re.findall(r"<calc>(.*?)</calc>", messages[-1]["content"])
    return "\n".join(f"{each} = {calculate(each)}" for each in expressions) or None


def calculate(expression: str) -> str:
    """Return the value of sums and products of numbers; "error" for anything else."""
    try:
        return f"{value_of(ast.parse(expression.strip(), mode='eval').body):.12g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def value_of(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(left), value_of(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(operand)
    raise ValueError("not a sum or product of numbers")
