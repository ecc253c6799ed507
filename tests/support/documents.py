"""Small documents: one by hand that has everything, and hypothesis strategies for the rest."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ckptconv import dtypes
from ckptconv.document import (
    PROGRESS_FIELDS,
    Absent,
    Block,
    Candidate,
    Checkpoint,
    Group,
    Known,
    Optimizer,
    Param,
    Progress,
    Provenance,
    Residue,
    Schedule,
    Unknown,
)
from ckptconv.rawtree import DictNode, Lifted, ListNode, Opaque
from ckptconv.tensor import BufferSource, Extent, MissingTensor, StoredTensor, TensorSpec

_RNG = np.random.default_rng(7)


def array_tensor(shape=(2, 3), dtype="float32") -> StoredTensor:
    """A tensor of random bytes of any dtype that has elements of one length."""
    row = dtypes.BY_NAME[dtype]
    count = int(np.prod(shape, dtype=np.int64))
    if dtype == "bool":
        data = _RNG.integers(0, 2, count, np.uint8).tobytes()
    else:
        data = _RNG.integers(0, 256, count * row.itemsize, np.uint8).tobytes()
    extent = Extent(source=BufferSource(data), offset=0, nbytes=len(data))
    return StoredTensor.dense(TensorSpec(dtype=row, shape=tuple(shape)), extent)


def string_tensor() -> StoredTensor:
    """Two strings in a bundle's encoding: opaque bytes here."""
    data = b"\x01\x02\x00\x00\x00\x00abc"
    spec = TensorSpec(dtype=dtypes.BY_NAME["string"], shape=(2,), encoded_nbytes=len(data))
    return StoredTensor.dense(spec, Extent(source=BufferSource(data), offset=0, nbytes=len(data)))


def full_document() -> Checkpoint:
    """A document with every field in use and every exception of the compact form."""
    kernel, bias = array_tensor((2, 3)), array_tensor((3,), "bfloat16")
    step = Known(value=9, source="optimizer/_iterations")
    progress = Progress(
        step=step,
        epochs=Unknown(
            reason="two conventions",
            candidates=(Candidate(value=1, source="epoch", condition="count"),),
        ),
        batch_in_epoch=Absent(),
        micro_steps=Known(value=18, status="derived", source="step", formula="step * 2"),
        accumulation=Known(value=2, status="supplied", source="--set"),
        samples=Known(value=2**60, source="samples"),
        loss_scale=Known(value=65536.0, source="scaler"),
        skipped_steps=Absent(reason="no loss scaling"),
    )
    params = {
        "dense/kernel": Param(
            name="dense/kernel",
            tensor=kernel,
            role="kernel",
            layer="dense",
            axes=("in", "out"),
            evidence="named",
            trainable=True,
        ),
        "bias": Param(name="bias", tensor=bias, trainable=True),
        "head.kernel": Param(name="head.kernel", tensor=kernel, trainable=True, tied_to="dense/kernel"),
        "empty": Param(name="empty", tensor=array_tensor((0, 4)), trainable=False),
        "phase": Param(name="phase", tensor=array_tensor((2,), "complex128")),
        "names": Param(name="names", tensor=string_tensor(), role="buffer"),
    }
    adam = Optimizer(
        name="optimizer",
        algorithm="adam",
        framework="torch",
        form={"epsilon": "corrected"},
        step=Known(value=9, source="optimizer.state.*.step"),
        param_steps={"dense/kernel": 9, "bias": 4},
        groups=(
            Group(
                params=("dense/kernel",),
                hyperparameters={
                    "learning_rate": Known(value=0.1, source="lr"),
                    "betas": Known(value=(0.9, 0.999), source="betas"),
                    "foreach": Known(value=None, source="foreach"),
                    "maximize": Known(value=False, source="maximize"),
                    "cap": Known(value=float("inf"), source="cap"),
                },
            ),
            Group(params=("bias",), hyperparameters={"learning_rate": Unknown(reason="a tensor")}),
        ),
        slots={
            "first_moment": {"dense/kernel": array_tensor((2, 3)), "bias": array_tensor((3,))},
            "second_moment": {"dense/kernel": array_tensor((3, 2)), "bias": array_tensor((3,), "bfloat16")},
            "master": {"bias": array_tensor((3,), "float32")},
        },
        scalars={"momentum_product": Known(value=-0.0, source="m")},
        param_order="declaration-order",
    )
    sgd = Optimizer(
        name="gen/sgd",
        algorithm="unknown",
        algorithm_candidates=("sgd", "muon"),
        framework="torch",
        step=Unknown(reason="sgd stores none"),
    )
    root = DictNode(
        items=(
            ("w", Lifted(to=("param", "dense/kernel"), encoding={"as": "tensor", "shape": (1, 2)})),
            (3, ListNode(items=(b"\0", 2**80, 1 + 2j, None), kind="tuple")),
        ),
        kind="collections.OrderedDict",
        state=Opaque(kind="global", name="torch.float32"),
    )
    return Checkpoint(
        progress=progress,
        params=params,
        optimizers=(adam, sgd),
        schedules=(
            Schedule(
                name="scheduler",
                family="cosine",
                position=Known(value=9, source="last_epoch"),
                unit="update",
                parameters={"T_max": Known(value=100, source="T_max")},
            ),
        ),
        rng=(Block(name="rng", library="torch-cpu", tensors=("rng",)),),
        data=(Block(name="loader", library="unknown"),),
        extras={"rng": array_tensor((8,), "uint8"), "avg": array_tensor((2,), "complex32")},
        residue=Residue(
            format="pytorch",
            dialect="plain",
            root=root,
            attributes={"protocol": 2, "records": ("a", "b"), "name": "archive"},
        ),
        provenance=Provenance(
            format="pytorch",
            dialect="plain",
            evidence="keys",
            source="run.pt",
            producer="torch 2.13",
            supplied=(("epochs", "--set"),),
            history=("keras -> torch",),
        ),
        oddities=("One parameter has another step.",),
        extensions={"acme.com/run": {"id": [1, "x"]}},
    )


_INTS = st.integers(-(2**70), 2**70)
_SCALARS = st.none() | st.booleans() | _INTS | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(_SCALARS, lambda part: st.lists(part, max_size=3).map(tuple), max_leaves=4)
_TEXT = st.text(max_size=6)
_CANDIDATES = st.lists(st.builds(Candidate, value=VALUES, source=_TEXT, condition=_TEXT), max_size=2).map(
    tuple
)


def facts(values=VALUES):
    """Facts of every status."""
    known = st.builds(
        Known,
        value=values,
        status=st.sampled_from(["recorded", "derived", "supplied"]),
        source=_TEXT,
        formula=st.none() | _TEXT,
    )
    return known | st.builds(Unknown, reason=_TEXT, candidates=_CANDIDATES) | st.builds(Absent, reason=_TEXT)


_COUNTS = facts(st.integers(0, 2**70))
_AMOUNTS = facts(st.integers(0, 2**70) | st.floats(0, allow_nan=False))
_AMOUNT_FIELDS = ("epochs", "loss_scale")
PROGRESS = st.builds(
    Progress, **{name: _AMOUNTS if name in _AMOUNT_FIELDS else _COUNTS for name in PROGRESS_FIELDS}
)
_FACT_MAPS = st.dictionaries(_TEXT, facts(), max_size=2)
_SPECS = st.builds(
    TensorSpec,
    dtype=st.sampled_from(dtypes.ROWS).filter(lambda row: row.itemsize),
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
) | st.builds(
    TensorSpec,
    dtype=st.just(dtypes.BY_NAME["string"]),
    shape=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    encoded_nbytes=st.integers(0, 99),
)


@st.composite
def documents(draw) -> Checkpoint:
    """Any small skeleton: names that are hard on keys, ties, several optimizers, uneven slots."""
    names = draw(st.lists(_TEXT, max_size=4, unique=True))
    params: dict[str, Param] = {}
    for name in names:
        spec = draw(_SPECS)
        untied = [n for n, p in params.items() if p.tied_to is None]
        params[name] = Param(
            name=name,
            tensor=MissingTensor(spec=spec, name=name),
            role=draw(st.sampled_from(["kernel", "unknown"])),
            axes=draw(st.none() | st.just(tuple(f"a{i}" for i in range(len(spec.shape))))),
            trainable=draw(st.sampled_from([None, True, False])),
            tied_to=draw(st.sampled_from([None, *untied])),
        )
    progress = draw(PROGRESS)
    optimizers = []
    for name in draw(st.lists(_TEXT, max_size=2, unique=True)):
        own = draw(st.permutations(names))
        cut = draw(st.integers(0, len(own)))
        groups = tuple(
            Group(params=tuple(part), hyperparameters=draw(_FACT_MAPS)) for part in (own[:cut], own[cut:])
        )
        slots = {}
        for slot in draw(st.lists(_TEXT, max_size=2, unique=True)):
            there = draw(st.sampled_from([own, own[1:], own[::-1]]))
            spec = draw(st.none() | _SPECS)
            slots[slot] = {
                p: MissingTensor(spec=spec or params[p].tensor.spec, name=".".join((name, slot, p)))
                for p in there
            }
        step = draw(st.just(progress.step) | _COUNTS)
        if isinstance(progress.step, Known) and isinstance(step, Known):
            step = draw(st.builds(Known, value=st.just(progress.step.value), source=_TEXT))
        steps = draw(st.dictionaries(st.sampled_from(own), st.integers(0, 3))) if own else {}
        if steps and isinstance(step, Known) and draw(st.booleans()):
            steps[own[0]] = step.value
        optimizers.append(
            Optimizer(
                name=name,
                algorithm=draw(st.sampled_from(["adam", "unknown"])),
                framework="torch",
                form=draw(st.dictionaries(_TEXT, _TEXT, max_size=1)),
                step=step,
                param_steps=steps,
                groups=groups,
                slots=slots,
                scalars=draw(_FACT_MAPS),
                param_order=draw(st.sampled_from(["named", "unknown"])),
            )
        )
    schedules = ()
    if optimizers:
        schedule = st.builds(
            Schedule,
            name=_TEXT,
            family=_TEXT,
            position=facts(),
            unit=st.sampled_from(["update", "epoch", "unknown"]),
            parameters=_FACT_MAPS,
            optimizer=st.just(optimizers[0].name),
        )
        schedules = tuple(draw(st.lists(schedule, max_size=1)))
    return Checkpoint(
        progress=progress,
        params=params,
        optimizers=tuple(optimizers),
        schedules=schedules,
        provenance=draw(st.builds(Provenance, source=_TEXT, history=st.lists(_TEXT, max_size=2).map(tuple))),
        oddities=draw(st.lists(_TEXT, max_size=2).map(tuple)),
    )


def same_bytes(a, b) -> bool:
    """Whether two tensors are equal to the last bit."""
    windows = (b"".join(w.tobytes() for w in t.windows()) for t in (a, b))
    return a.spec == b.spec and len(set(windows)) == 1
