"""TensorFlow's protocol buffers that a checkpoint holds: each class below is the table of a message's fields.

The classes are made into real messages in a descriptor pool of their own, so that TensorFlow, which
registers the same names in the default pool, may be loaded in the same process before or after.

Enums are declared int32: the wire is the same, and an unknown value stays a number. Messages that the
original files nest stand here under their own name. A oneof of one member is an `optional` field.

Source: tensorflow v2.21 `tensorflow/core/protobuf/{tensor_bundle,trackable_object_graph}.proto`,
`tensorflow/core/util/saved_tensor_slice.proto`,
`tensorflow/core/framework/{tensor_shape,tensor_slice,versions}.proto`,
`tensorflow/python/training/checkpoint_state.proto`; `optional_restore` as up to v2.5, reserved since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from ckptconv.errors import FormatError, Loc

T = TypeVar("T")


class Repeated(Protocol[T]):
    """A repeated field."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T]: ...
    def __getitem__(self, index: int) -> T: ...
    def add(self) -> T:
        """A new last element of a field of messages."""

    def append(self, value: T) -> None:
        """Add a number or text."""


class Wire(message.Message):
    """A message of the table; never instantiated: `new` and `parse` make the real messages."""


class VersionDef(Wire):
    producer: Annotated[int, 1, "int32"]
    min_consumer: Annotated[int, 2, "int32"]
    bad_consumers: Annotated[Repeated[int], 3, "int32"]


class BundleHeaderProto(Wire):
    num_shards: Annotated[int, 1, "int32"]
    endianness: Annotated[int, 2, "int32"]
    version: Annotated[VersionDef, 3]


class Dim(Wire):
    size: Annotated[int, 1, "int64"]
    name: Annotated[str, 2, "string"]


class TensorShapeProto(Wire):
    dim: Annotated[Repeated[Dim], 2]
    unknown_rank: Annotated[bool, 3, "bool"]


class Extent(Wire):
    start: Annotated[int, 1, "int64"]
    length: Annotated[int, 2, "int64", "optional"]


class TensorSliceProto(Wire):
    extent: Annotated[Repeated[Extent], 1]


class BundleEntryProto(Wire):
    dtype: Annotated[int, 1, "int32"]
    shape: Annotated[TensorShapeProto, 2]
    shard_id: Annotated[int, 3, "int32"]
    offset: Annotated[int, 4, "int64"]
    size: Annotated[int, 5, "int64"]
    crc32c: Annotated[int, 6, "fixed32"]
    slices: Annotated[Repeated[TensorSliceProto], 7]


class SavedSliceMeta(Wire):
    name: Annotated[str, 1, "string"]
    shape: Annotated[TensorShapeProto, 2]
    type: Annotated[int, 3, "int32"]
    slice: Annotated[Repeated[TensorSliceProto], 4]


class SavedTensorSliceMeta(Wire):
    tensor: Annotated[Repeated[SavedSliceMeta], 1]
    versions: Annotated[VersionDef, 2]


class SavedTensorSlices(Wire):
    """Of the two fields the first: the other holds a tensor, see `saved_slices`."""

    meta: Annotated[SavedTensorSliceMeta, 1]


class CheckpointState(Wire):
    model_checkpoint_path: Annotated[str, 1, "string"]
    all_model_checkpoint_paths: Annotated[Repeated[str], 2, "string"]
    all_model_checkpoint_timestamps: Annotated[Repeated[float], 3, "double"]
    last_preserved_timestamp: Annotated[float, 4, "double"]


class SavedObjectMetadata(Wire):
    node_id: Annotated[int, 2, "int32"]
    node_path: Annotated[str, 3, "string"]
    identifier: Annotated[str, 4, "string"]
    metadata: Annotated[str, 5, "string"]
    version: Annotated[VersionDef, 6]


class SavedMetadata(Wire):
    nodes: Annotated[Repeated[SavedObjectMetadata], 1]


class BoolValue(Wire):
    value: Annotated[bool, 1, "bool"]


class RegisteredSaver(Wire):
    name: Annotated[str, 1, "string"]
    object_name: Annotated[str, 2, "string"]


class ObjectReference(Wire):
    node_id: Annotated[int, 1, "int32"]
    local_name: Annotated[str, 2, "string"]


class SerializedTensor(Wire):
    name: Annotated[str, 1, "string"]
    full_name: Annotated[str, 2, "string"]
    checkpoint_key: Annotated[str, 3, "string"]
    optional_restore: Annotated[bool, 4, "bool"]


class SlotVariableReference(Wire):
    original_variable_node_id: Annotated[int, 1, "int32"]
    slot_name: Annotated[str, 2, "string"]
    slot_variable_node_id: Annotated[int, 3, "int32"]


class TrackableObject(Wire):
    children: Annotated[Repeated[ObjectReference], 1]
    attributes: Annotated[Repeated[SerializedTensor], 2]
    slot_variables: Annotated[Repeated[SlotVariableReference], 3]
    registered_saver: Annotated[RegisteredSaver, 4]
    has_checkpoint_values: Annotated[BoolValue, 5]


class TrackableObjectGraph(Wire):
    nodes: Annotated[Repeated[TrackableObject], 1]


_PACKAGE = "ckptconv.tensorflow"
_FILE = "ckptconv/tensorflow.proto"
_MESSAGES: tuple[type[Wire], ...] = (
    VersionDef,
    BundleHeaderProto,
    Dim,
    TensorShapeProto,
    Extent,
    TensorSliceProto,
    BundleEntryProto,
    SavedSliceMeta,
    SavedTensorSliceMeta,
    SavedTensorSlices,
    CheckpointState,
    SavedObjectMetadata,
    SavedMetadata,
    BoolValue,
    RegisteredSaver,
    ObjectReference,
    SerializedTensor,
    SlotVariableReference,
    TrackableObject,
    TrackableObjectGraph,
)
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS: dict[str, descriptor_pb2.FieldDescriptorProto.Type.ValueType] = {
    "double": _Field.TYPE_DOUBLE,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "fixed32": _Field.TYPE_FIXED32,
    "bool": _Field.TYPE_BOOL,
    "string": _Field.TYPE_STRING,
}


def _describe(kind: type[Wire], into: descriptor_pb2.DescriptorProto) -> None:
    """Fill a message descriptor from a class's annotations."""
    into.name = kind.__name__
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        value, number, *wire = get_args(hint)
        repeated = get_origin(value) is Repeated
        field = into.field.add(name=name, number=number)
        field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
        if wire:
            field.type = _SCALARS[wire[0]]
        else:
            field.type = _Field.TYPE_MESSAGE
            target = get_args(value)[0] if repeated else value
            field.type_name = f".{_PACKAGE}.{target.__name__}"
        if "optional" in wire:
            field.proto3_optional = True
            field.oneof_index = len(into.oneof_decl)
            into.oneof_decl.add(name=f"_{name}")


def _build() -> dict[type[Wire], type[message.Message]]:
    file = descriptor_pb2.FileDescriptorProto(name=_FILE, package=_PACKAGE, syntax="proto3")
    for kind in _MESSAGES:
        _describe(kind, file.message_type.add())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        kind: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{kind.__name__}"))
        for kind in _MESSAGES
    }


_CLASSES = _build()

W = TypeVar("W", bound=Wire)


def new(kind: type[W]) -> W:
    """An empty message."""
    return cast("W", _CLASSES[kind]())


def decoder(kind: type[W]) -> Callable[[bytes], W]:
    """For loops that cannot pay for `parse`: raises protobuf's DecodeError, keeps unknown fields."""
    return cast("Callable[[bytes], W]", _CLASSES[kind].FromString)


def parse(kind: type[W], data: bytes, loc: Loc) -> W:
    """A message from its bytes; all of them are understood.

    Raises: corrupt-file; unsupported-feature where a field is not in the table.
    """
    try:
        parsed = cast("W", _CLASSES[kind].FromString(data))
    except message.DecodeError as error:
        raise FormatError.of(
            "corrupt-file",
            f"{len(data)} bytes are no {kind.__name__}",
            "Copy the file again.",
            loc=loc,
        ) from error
    refuse_unknown(parsed, kind, loc)
    return parsed


def refuse_unknown(parsed: Wire, kind: type[Wire], loc: Loc) -> None:
    """Drop the fields that the table does not have, and complain if there were any.

    Raises: unsupported-feature.
    """
    before = parsed.ByteSize()
    parsed.DiscardUnknownFields()
    unknown = before - parsed.ByteSize()
    if unknown:
        raise FormatError.of(
            "unsupported-feature",
            f"{unknown} bytes of a {kind.__name__} are fields that are not known here",
            "Save it with TensorFlow 2.21 or older, or report the version that wrote it.",
            loc=loc,
        )
