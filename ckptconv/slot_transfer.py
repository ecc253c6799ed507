"""The slots of an optimizer: what makes each of a parameter's in the target, and what is begun anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ckptconv import dtypes
from ckptconv.account import MASTER, Account, through
from ckptconv.catalog.conversion import Conversion
from ckptconv.catalog.factored import FACTORS, factor_of
from ckptconv.catalog.optimizer_rows import shape_of_slot
from ckptconv.catalog.slots import SlotConversion
from ckptconv.document import (
    Checkpoint,
    Optimizer,
)
from ckptconv.errors import Problem
from ckptconv.ops import Reshape
from ckptconv.report import Entry
from ckptconv.tensor import FilledTensor, TensorRef, TensorSpec
from ckptconv.ties import Pair

_NUMBER = TensorSpec(dtype=dtypes.BY_NAME["float32"], shape=())
_WIDE_NUMBER = TensorSpec(dtype=dtypes.BY_NAME["float64"], shape=())
"""How a number per parameter stands that the source keeps once (torch's `mu_product`): float32 as torch makes
it, where that holds the number. Loading it, torch gives it the dtype of its parameter."""


def transfer_slots(
    origin: Optimizer,
    target: Optimizer,
    producers: Mapping[str, str],
    pairs: Mapping[str, Pair],
    source: Checkpoint,
    conversion: Conversion,
    account: Account,
) -> dict[str, dict[str, TensorRef]]:
    result: dict[str, dict[str, TensorRef]] = {}
    rows = list(conversion.slots)
    counted = conversion.param_steps
    if MASTER in origin.slots and MASTER in target.slots and MASTER in conversion.left:
        rows.append(SlotConversion(slot=MASTER, ops=((),) * len(target.groups)))
    for slot_row in rows:
        made: dict[str, TensorRef] = {}
        places = target.slots.get(slot_row.slot)
        for position, group in enumerate(target.groups):
            for name in group.params:
                layout = pairs[name].ops if name in pairs else ()
                origin_slot: str | None = slot_row.slot
                if slot_row.shape in FACTORS:
                    origin_slot = factor_of(slot_row.slot, layout)
                if origin_slot is None:
                    if producers.get(name) in origin.slots.get(slot_row.slot, {}):
                        _no_factors(name, slot_row.slot, target, account)
                    if places and name in places:
                        made[name] = _begun(slot_row, name, places[name], target, source, pairs, account)
                    continue
                have = (
                    None
                    if slot_row.created
                    else origin.slots.get(origin_slot, {}).get(producers.get(name, ""))
                )
                place = places.get(name) if places else None
                if have is None and places is None and slot_row.shape == "scalar" and name in counted:
                    number = FilledTensor(spec=_NUMBER)
                    made[name] = _begun(slot_row, name, number, target, source, pairs, account)
                    continue
                if have is None and places is None:
                    continue  # a target that creates state per parameter has none for this one either
                if have is None:
                    if place is None:
                        continue
                    if name not in producers:
                        made[name] = place
                        account.ledger.append(
                            Entry(
                                item=("template", f"{name}/{slot_row.slot}"),
                                fate="kept-from-template",
                                target=f"{name}/{slot_row.slot}",
                                detail="its parameter has no partner in the source",
                                allowed_by="param-unmatched",
                            )
                        )
                        continue
                    made[name] = _begun(slot_row, name, place, target, source, pairs, account)
                    account.ledger.append(
                        Entry(
                            item=("slot", origin.name, slot_row.slot, producers.get(name, name)),
                            fate="created",
                            target=f"{name}/{slot_row.slot}",
                            detail=f"the source has none for it; {slot_row.init} before the first update",
                        )
                    )
                    continue
                shape = shape_of_slot(slot_row.shape, _shape_of(target, name, pairs, source)) or ()
                spec = place.spec if place else TensorSpec(dtype=have.dtype, shape=shape)
                if slot_row.shape in FACTORS:
                    layout = (Reshape(have.shape, spec.shape),) if have.shape != spec.shape else ()
                elif slot_row.shape == "scalar":
                    layout = ()
                ops = (*layout, *slot_row.ops[position])
                made[name], done = through(
                    have, ops, spec, ("optimizers", target.name, slot_row.slot, name), account
                )
                account.ledger.append(
                    Entry(
                        item=("slot", origin.name, origin_slot, producers[name]),
                        fate="transformed" if done else "copied",
                        target=f"{name}/{slot_row.slot}",
                        ops=tuple(op.to_json() for op in done),
                    )
                )
        result[slot_row.slot] = made
    for slot in conversion.left:
        if slot in conversion.scalars:
            account.ledger.append(
                Entry(item=("slot", origin.name, slot), fate="transformed", target=f"{target.name}.{slot}")
            )
        elif slot != MASTER:
            detail = "the target's rule does not read it"
            account.ledger.append(Entry(item=("slot", origin.name, slot), fate="left", detail=detail))
    return result


def _begun(
    slot: SlotConversion,
    name: str,
    place: TensorRef,
    target: Optimizer,
    source: Checkpoint,
    pairs: Mapping[str, Pair],
    account: Account,
) -> TensorRef:
    """A slot as before the first update."""
    loc = ("optimizers", target.name, slot.slot, name)
    if slot.init == "param":
        pair = pairs[name]
        return through(source.params[pair.source].tensor, pair.ops, place.spec, loc, account)[0]
    if not isinstance(slot.init, str):
        wide = slot.shape == "scalar" and float(np.float32(slot.init)) != slot.init
        return FilledTensor(spec=_WIDE_NUMBER if wide else place.spec, value=slot.init)
    account.problems.append(
        Problem(
            code="hyperparameter-missing",
            loc=loc,
            message=f"the {slot.slot} of '{name}' begins at {slot.init}, which neither side records",
            hint=f"Pass --set {slot.init}=VALUE.",
        )
    )
    return place


def _no_factors(name: str, slot: str, target: Optimizer, account: Account) -> None:
    message = f"the two frameworks factor the second moment of '{name}' over different axes"
    problem = Problem(
        code="form-mismatch",
        loc=("optimizers", target.name, slot, name),
        message=message,
        hint="Allow form-mismatch to begin its second moment anew.",
    )
    if account.refuse(problem):
        verdict = account.verdicts[-1]
        residuals = tuple(dict.fromkeys((*verdict.residuals, f"{message}: it begins anew")))
        account.verdicts[-1] = replace(verdict, verdict="lossy", residuals=residuals)


def _shape_of(target: Optimizer, name: str, pairs: Mapping[str, Pair], source: Checkpoint) -> tuple[int, ...]:
    tensor = source.params[pairs[name].source].tensor
    for op in pairs[name].ops:
        tensor = tensor.apply(op)
    return tensor.shape
