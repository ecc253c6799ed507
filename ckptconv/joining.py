"""A transfer of pieces as the file has them: the target's parameters together again.

What each piece of the target came to is joined along the axis of its cut, slots as the parameter. A sum
stands in its first term, the others are 0; each term that is trained has the sum's state, since their
gradients are one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptconv.account import Transfer
from ckptconv.document import Checkpoint, Optimizer, Param
from ckptconv.errors import Code, Problem
from ckptconv.ops import Concat
from ckptconv.pieces import Cut, Sum, of_values
from ckptconv.telling import Side, entries, judged, told
from ckptconv.tensor import FilledTensor, TensorRef


def together(result: Transfer, source: Side, target: Side, allow: frozenset[str]) -> Transfer:
    """The result under the names of the files.

    Problems: form-mismatch for slots that no piece can have, slots-missing, unequal-steps, groups-differ.
    """
    if not source.rewrites and not target.rewrites:
        return result
    joiner = _Joiner(source, target, allow)
    joiner.judge_source()
    problems = tuple(told(problem, (source, target)) for problem in result.problems)
    checkpoint = result.checkpoint if problems else joiner.joined(result.checkpoint)
    return replace(
        result,
        checkpoint=checkpoint,
        ledger=tuple(entries(result.ledger, source, target)),
        verdicts=tuple(judged(one, source, target, joiner.allowed) for one in result.verdicts),
        problems=(*problems, *joiner.problems),
    )


class _Joiner:
    """Puts one transfer together; collects what stands in the way."""

    def __init__(self, source: Side, target: Side, allow: frozenset[str]) -> None:
        self._source, self._target, self._allow = source, target, allow
        self.problems: list[Problem] = []
        self.allowed: list[str] = []
        """What stood in the way and was allowed."""

    def _refuse(self, code: Code, optimizer: Optimizer, names: Sequence[str], what: str) -> None:
        message = f"{' and '.join(map(repr, names))} {what}"
        if code in self._allow:
            self.allowed.append(f"{message} (allowed: {code})")
            return
        loc = ("optimizers", optimizer.name, *names[:1])
        hint = f"Use a template without an optimizer, or allow {code} to go on."
        self.problems.append(Problem(code=code, loc=loc, message=message, hint=hint))

    def judge_source(self) -> None:
        """What of the source its pieces cannot have."""
        params = self._source.whole.params
        for optimizer in self._source.whole.optimizers:
            for cut in self._source.cuts:
                for slot, by_param in optimizer.slots.items():
                    tensor = by_param.get(cut.whole)
                    if tensor is None or tensor.spec.numel == 1:
                        continue
                    if tensor.shape != params[cut.whole].tensor.shape:
                        what = f"has a {slot} {list(tensor.shape)} that is of none of its parts"
                        self._refuse("form-mismatch", optimizer, (cut.whole,), what)
            groups = {name: group for group in optimizer.groups for name in group.params}
            for one in self._source.sums:
                names = tuple(map(self._source.file_name, self._source.trained(one, optimizer)))
                steps = {optimizer.param_steps.get(name) for name in names}
                if len(steps) > 1:
                    what = f"have done {' and '.join(sorted(map(str, steps)))} updates"
                    self._refuse("unequal-steps", optimizer, names, what)
                if any(groups[n].hyperparameters != groups[names[0]].hyperparameters for n in names):
                    self._refuse("groups-differ", optimizer, names, "are trained with other settings")

    def joined(self, made: Checkpoint) -> Checkpoint:
        """The target's document under its own names."""
        template = self._target.whole
        tensors = {name: param.tensor for name, param in made.params.items()}
        for one in reversed(self._target.rewrites):
            if isinstance(one, Sum):
                total = tensors.pop(one.whole.name)
                tensors[one.terms[0]] = total
                tensors.update((term, FilledTensor(spec=total.spec)) for term in one.terms[1:])
            else:
                tensors[one.whole] = _join(
                    one, [tensors.pop(piece.name) for piece in one.pieces], template.params[one.whole]
                )
        params = {name: replace(param, tensor=tensors[name]) for name, param in template.params.items()}
        optimizers = tuple(self._optimizer(one, template.optimizer(one.name)) for one in made.optimizers)
        return replace(made, params=params, optimizers=optimizers)

    def _optimizer(self, made: Optimizer, template: Optimizer) -> Optimizer:
        groups = (replace(g, params=own.params) for g, own in zip(made.groups, template.groups, strict=True))
        slots = {slot: self._slot(slot, by_param, made, template) for slot, by_param in made.slots.items()}
        return replace(made, groups=tuple(groups), slots=slots, param_steps=self._steps(made, template))

    def _steps(self, made: Optimizer, template: Optimizer) -> dict[str, int]:
        steps = dict(made.param_steps)
        for one in reversed(self._target.rewrites):
            names = (one.whole.name,) if isinstance(one, Sum) else tuple(piece.name for piece in one.pieces)
            counts = {steps.pop(name) for name in names if name in steps}
            if not counts:
                continue
            wholes = self._trained(one, template) if isinstance(one, Sum) else (one.whole,)
            if len(counts) > 1:
                what = (
                    f"is made of parameters that have done {' and '.join(map(str, sorted(counts)))} updates"
                )
                self._refuse("unequal-steps", template, wholes, what)
            steps.update(dict.fromkeys(wholes, max(counts)))
        return steps

    def _trained(self, one: Sum, optimizer: Optimizer) -> tuple[str, ...]:
        """The terms of a sum that have state."""
        return self._target.trained(one, optimizer) or one.terms[:1]

    def _slot(
        self, slot: str, by_piece: Mapping[str, TensorRef], made: Optimizer, template: Optimizer
    ) -> dict[str, TensorRef]:
        tensors = dict(by_piece)
        for one in reversed(self._target.rewrites):
            if isinstance(one, Sum):
                total = tensors.pop(one.whole.name, None)
                if total is not None:
                    first, *others = self._trained(one, template)
                    rest = FilledTensor(spec=total.spec) if of_values(made, slot) else total
                    tensors.update({first: total, **dict.fromkeys(others, rest)})
                continue
            parts = {piece.name: tensors.pop(piece.name) for piece in one.pieces if piece.name in tensors}
            what = _in_the_way(one, slot, list(parts.values()))
            if parts and not what:
                tensors[one.whole] = _join(one, list(parts.values()), self._target.whole.params[one.whole])
                continue
            if parts:
                code: Code = "form-mismatch" if len(parts) == len(one.pieces) else "slots-missing"
                self._refuse(code, template, (one.whole,), what)
            if one.whole in template.slots.get(slot, {}):
                tensors[one.whole] = template.slots[slot][one.whole]
        return tensors


def _in_the_way(cut: Cut, slot: str, parts: Sequence[TensorRef]) -> str:
    """Why the slots of a parameter's pieces do not make one of its own; empty where they do."""
    if len(parts) != len(cut.pieces):
        return f"has a {slot} for {len(parts)} of its {len(cut.pieces)} parts alone"
    if len(parts) == 1 or all(part.spec.numel == 1 for part in parts):
        return ""
    sizes = [part.shape[cut.axis] if cut.axis < len(part.shape) else 0 for part in parts]
    if sizes == [piece.size for piece in cut.pieces] and len({len(part.shape) for part in parts}) == 1:
        return ""
    return f"has no {slot} that follows from those of its {len(parts)} parts"


def _join(cut: Cut, parts: Sequence[TensorRef], whole: Param) -> TensorRef:
    """The whole: of one number per parameter any piece's."""
    first, *others = parts
    if not others or not first.shape or (first.spec.numel == 1 and cut.pieces[0].size != 1):
        return first
    joined = first.apply(Concat(cut.axis), *others)
    for op in cut.opened(whole.tensor.shape):
        joined = joined.apply(op.inverse())
    return joined
