"""What the axes of an einsum layer's kernel are, from its equation."""

from __future__ import annotations

import re

_EQUATION = re.compile(r"(?:\.\.\.)?(\w+),(\w+)->(?:\.\.\.)?(\w+)")


def contraction(equation: object) -> tuple[str, ...]:
    """`in` or `out` for each axis of the kernel: `("in", "out", "out")` of `abc,cde->abde`.

    Empty where the kernel has other axes too, or where those of one side stand in another order than in the
    input or the output: no matrix multiplication of theirs is the same.
    """
    found = _EQUATION.fullmatch(equation.replace(" ", "")) if isinstance(equation, str) else None
    if found is None:
        return ()
    given, kernel, made = found.groups()
    taken = [axis for axis in kernel if axis in given and axis not in made]
    out = [axis for axis in kernel if axis in made and axis not in given]
    in_order = [a for a in given if a in taken] == taken and [a for a in made if a in out] == out
    if not in_order or len(taken) + len(out) != len(kernel) or len(set(kernel)) != len(kernel):
        return ()
    return tuple("in" if axis in taken else "out" for axis in kernel)
