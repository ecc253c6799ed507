"""What a torch.distributed.checkpoint folder holds: the same dictionaries that training loops save in files.

Every convention of a PyTorch file is one of a folder too, since a folder is a flattened dictionary: these
dialects are those of files, around them what the flattening makes of an optimizer (`dcp_forms`). Their
residue is that of the file's dialect, so that a run goes from a folder into a file and back as it goes from a
file into a file. Written to a folder, an optimizer is keyed by the names of its parameters wherever they are
known: `torch.distributed.checkpoint.load` asks for them, into what `get_state_dict` gives.
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.dialects import torch_plain, torch_state_dict
from ckptconv.dialects.base import Detection, Dialect, register
from ckptconv.dialects.dcp_beside import STATE, gathered, scattered
from ckptconv.dialects.dcp_forms import FORMS, folded, unfolded
from ckptconv.dialects.dcp_megatron import LEFT, STACKED, apart, is_torch_dist, whole
from ckptconv.dialects.lightning import Lightning
from ckptconv.dialects.megatron import Megatron
from ckptconv.dialects.torch_table import MEGATRON, ROWS, TORCHTITAN
from ckptconv.dialects.torch_values import places
from ckptconv.document import Checkpoint
from ckptconv.errors import FormatError, Problem
from ckptconv.formats.dcp_ranks import REPEATED
from ckptconv.formats.dcp_shards import UNSEEN
from ckptconv.formats.dcp_write import UNFLATTENED
from ckptconv.rawtree import DictNode, Path, RawTree

_BESIDE, _MODEL = "beside", "model_key"
"""Attributes of the residue: what stood beside the entries, and the key of the model among them."""
_UNSEEN = "The shards do not record how large the tensors are: a missing last shard cannot be seen."

_OF_RANK_0 = (
    "Every rank saved for itself: of {} entries that several have, such as counters and random states, those "
    "of the lowest rank are read."
)

_RESTORE_MODEL = """import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

state = get_model_state_dict(model)
dcp.load(state, checkpoint_id={target!r})
set_model_state_dict(model, state)"""
_RESTORE = """import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

options = StateDictOptions({flat})
model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
state = {{{model!r}: model_state, {optimizer!r}: optimizer_state}}
dcp.load(state, checkpoint_id={target!r})
set_state_dict(
    model,
    optimizer,
    model_state_dict=state[{model!r}],
    optim_state_dict=state[{optimizer!r}],
    options=options,
)"""


class InFolder:
    """A dialect of PyTorch files, in a folder."""

    format = "dcp"

    def __init__(self, inner: Dialect) -> None:
        self._inner = inner
        self.name, self.summary = inner.name, inner.summary
        self.needs_template, self.save_counter = inner.needs_template, inner.save_counter
        self.framework = inner.framework

    def detect(self, raw: RawTree) -> Detection | None:
        """As in a file."""
        return self._inner.detect(_as_file(raw)) if isinstance(raw.root, DictNode) else None

    def lift(self, raw: RawTree) -> Checkpoint:
        """As from a file. I/O and errors: those of the file's dialect."""
        if not isinstance(raw.root, DictNode):
            raise FormatError.of(
                "unknown-dialect", "the folder holds no dictionary", "See: ckptconv inspect --raw.", loc=()
            )
        raw = _as_file(raw)
        checkpoint = self._inner.lift(raw)
        provenance = replace(
            checkpoint.provenance, format=self.format, producer="PyTorch, torch.distributed.checkpoint"
        )
        unseen = (_UNSEEN,) if raw.attributes.get(UNSEEN) is True else ()
        repeated = raw.attributes.get(REPEATED, 0)
        own = (_OF_RANK_0.format(repeated),) if repeated else ()
        left = raw.attributes.get(LEFT)
        said = (left,) if isinstance(left, str) else ()
        return replace(
            checkpoint, provenance=provenance, oddities=(*checkpoint.oddities, *unseen, *own, *said)
        )

    def lower(self, checkpoint: Checkpoint) -> RawTree:
        """The file's tree, an optimizer's parameters by their names."""
        raw = self._inner.lower(checkpoint)
        forms = raw.attributes.get(FORMS, ())
        assert isinstance(raw.root, DictNode)
        if STACKED in raw.attributes:
            root = apart(raw.root, raw.attributes)
            return RawTree(format=self.format, root=root, attributes={UNFLATTENED: True}, note=raw.note)
        root = folded(raw.root, forms if isinstance(forms, tuple) else (), _names(checkpoint))
        beside = raw.attributes.get(_BESIDE)
        if isinstance(beside, tuple) or self.name == Lightning.name:
            model = raw.attributes.get(_MODEL)
            root = scattered(
                root,
                beside if isinstance(beside, tuple) else None,
                model if isinstance(model, str) else STATE,
            )
        return RawTree(format=self.format, root=root, note=raw.note)

    def template_problems(self, template: Checkpoint) -> tuple[Problem, ...]:
        """Those of the file's dialect."""
        return self._inner.template_problems(template)

    def restore_code(self, checkpoint: Checkpoint, target: str) -> str:
        """Loading into what `get_state_dict` gives; empty for a dictionary of another kind."""
        if self.name in (Lightning.name, MEGATRON.name):
            return self._inner.restore_code(checkpoint, target)
        residue = checkpoint.residue
        root = residue.root if residue is not None else DictNode()
        models = {path[:-1] for path, lifted in places(root) if lifted.to[0] == "param"}
        optimizers = [path for path in _names(checkpoint) if len(path) == 1]
        forms = residue.attributes.get(FORMS, ()) if residue is not None else ()
        told = forms if isinstance(forms, tuple) else ()
        if models <= {()}:
            return _RESTORE_MODEL.format(target=target)
        if len(models) != 1 or len(optimizers) != 1 or any(form.startswith("loose") for form in told):
            return ""
        (path,), (optimizer,) = models.pop(), optimizers[0]
        flat = "flatten_optimizer_state_dict=True" if any(form.startswith("flat") for form in told) else ""
        return _RESTORE.format(model=path, optimizer=optimizer, target=target, flat=flat)


def _as_file(raw: RawTree) -> RawTree:
    """The tree as a file of the same dictionary has it."""
    assert isinstance(raw.root, DictNode)
    if is_torch_dist(raw.root):
        root, told = whole(raw.root)
        return replace(raw, format="pytorch", root=root, attributes={**raw.attributes, **told})
    together, beside, model = gathered(raw.root)
    root, forms = unfolded(together)
    attributes = {**raw.attributes, **({FORMS: forms} if forms else {})}
    if beside:
        attributes |= {_BESIDE: beside, _MODEL: model}
    return replace(raw, format="pytorch", root=root, attributes=attributes)


def _names(checkpoint: Checkpoint) -> dict[Path, tuple[str, ...]]:
    """Where optimizers stand whose parameters' names are known -> the names, in the order of groups."""
    residue = checkpoint.residue
    found: dict[Path, tuple[str, ...]] = {}
    for path, lifted in places(residue.root) if residue is not None else ():
        if lifted.to[0] != "hyperparameter" or "param_groups" not in path:
            continue
        where = path[: path.index("param_groups")]
        if where not in found:
            optimizer = checkpoint.optimizer(str(lifted.to[1]))
            known = optimizer.param_order != "unknown" and len(set(optimizer.params)) == len(optimizer.params)
            found[where] = optimizer.params if known else ()
    return {path: names for path, names in found.items() if names}


_INNER: tuple[Dialect, ...] = (
    torch_plain.Plain(),
    torch_state_dict.StateDict(),
    Lightning(),
    torch_plain.TrainingDictionary(TORCHTITAN),
    Megatron(),
    *(torch_plain.TrainingDictionary(row) for row in ROWS),
)
for _dialect in _INNER:
    register(InFolder(_dialect), tree=(_dialect.format, _dialect.name))
