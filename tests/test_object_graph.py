"""The object graph codec, and its messages beside TensorFlow's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.errors import CkptError
from ckptconv.formats import protos
from ckptconv.formats.object_graph import (
    MAX_DEPTH,
    Attribute,
    Edge,
    Node,
    ObjectGraph,
    RegisteredSaver,
    SlotVariable,
    escape,
    variable_key,
)

GRAPH = ObjectGraph(
    nodes=(
        Node(children=(Edge("model", 1), Edge("opt", 3), Edge("alias", 2))),
        Node(children=(Edge("kernel", 2),), registered_saver=RegisteredSaver(name="a", object_name="b")),
        Node(
            attributes=(
                Attribute(name="VARIABLE_VALUE", full_name="dense/kernel", checkpoint_key="model/kernel"),
            ),
            has_checkpoint_values=True,
        ),
        Node(
            children=(Edge("back", 0), Edge("deep", 4)),
            slot_variables=(SlotVariable(original=2, name="m", slot=4),),
            has_checkpoint_values=False,
        ),
        Node(attributes=(Attribute(name="x", optional_restore=True),)),
    )
)

text = st.text(max_size=6)
nodes = st.integers(0, 2)
graphs = st.builds(
    lambda rows: ObjectGraph(nodes=tuple(rows)),
    st.lists(
        st.builds(
            Node,
            children=st.lists(st.builds(Edge, text, nodes), max_size=3).map(tuple),
            attributes=st.lists(
                st.builds(
                    Attribute, name=text, full_name=text, checkpoint_key=text, optional_restore=st.booleans()
                ),
                max_size=2,
            ).map(tuple),
            slot_variables=st.lists(
                st.builds(SlotVariable, original=nodes, name=text, slot=nodes), max_size=2
            ).map(tuple),
            registered_saver=st.none() | st.builds(RegisteredSaver, name=text, object_name=text),
            has_checkpoint_values=st.none() | st.booleans(),
        ),
        min_size=3,
        max_size=5,
    ),
)


def codes(data: bytes) -> list[tuple[str, tuple[str | int, ...]]]:
    with pytest.raises(CkptError) as caught:
        ObjectGraph.parse(data, ("graph",))
    return [(problem.code, problem.loc) for problem in caught.value.problems]


@settings(max_examples=60, deadline=None)
@given(graphs)
def test_round_trip(graph: ObjectGraph) -> None:
    assert ObjectGraph.parse(graph.serialize()) == graph


def test_wire_format() -> None:
    node = Node(children=(Edge("a", 0), Edge("b", 300)), has_checkpoint_values=True)
    assert ObjectGraph(nodes=(node,)).serialize() == bytes.fromhex(
        "0a11 0a03 120161 0a06 08ac02 120162 2a02 0801"
    )


def test_walking() -> None:
    assert GRAPH.nodes[0].child("opt") == 3
    assert GRAPH.nodes[0].child("nothing") is None
    assert GRAPH.find(("opt", "back", "model", "kernel")) == 2
    assert GRAPH.find(("opt", "nothing", "x")) is None
    assert GRAPH.nodes[2].variable_key == "model/kernel"
    assert GRAPH.nodes[4].variable_key is None
    assert GRAPH.paths() == {0: (), 1: ("model",), 3: ("opt",), 2: ("alias",), 4: ("opt", "deep")}
    assert GRAPH.paths(enter=lambda node: node != 3) == {0: (), 1: ("model",), 3: ("opt",), 2: ("alias",)}


def test_keys() -> None:
    assert escape("a.b/c") == "a..b.Sc"
    assert variable_key(("model", "a.b/c")) == "model/a..b.Sc/.ATTRIBUTES/VARIABLE_VALUE"


def test_broken_references() -> None:
    for node in (
        Node(children=(Edge("far", 5),)),
        Node(children=(Edge("far", -1),)),
        Node(slot_variables=(SlotVariable(original=0, name="far", slot=5),)),
        Node(slot_variables=(SlotVariable(original=5, name="far", slot=0),)),
    ):
        assert codes(ObjectGraph(nodes=(node,)).serialize()) == [("reference-broken", ("graph", 0, "far"))]


def test_what_is_no_graph() -> None:
    assert codes(b"\xff") == [("corrupt-file", ("graph",))]
    assert codes(b"\x0a\x05a") == [("corrupt-file", ("graph",))]
    assert codes(b"\x0a\x05\x0a\x03\x12\x01\xff") == [("corrupt-file", ("graph",))]  # not UTF-8
    assert codes(b"\x0b" * 200_000) == [("corrupt-file", ("graph",))]  # groups in groups


def test_unknown_fields_are_refused() -> None:
    assert codes(GRAPH.serialize() + b"\x10\x01") == [("unsupported-feature", ("graph",))]
    assert codes(b"\x0a\x02\x30\x01") == [("unsupported-feature", ("graph",))]  # field 6 of a node


def test_a_long_chain_has_no_paths_of_quadratic_length() -> None:
    count = MAX_DEPTH + 3
    chain = ObjectGraph(nodes=tuple(Node(children=(Edge("n", min(i + 1, count - 1)),)) for i in range(count)))
    with pytest.raises(CkptError) as caught:
        chain.paths()
    assert caught.value.problems[0].code == "limit-exceeded"


def test_header_as_tensorflow_writes_it() -> None:
    header = protos.new(protos.BundleHeaderProto)
    header.num_shards = 1
    header.version.producer = 1
    assert header.SerializeToString() == bytes.fromhex("08011a020801")


def test_an_absent_length_is_not_a_zero() -> None:
    part = protos.parse(protos.TensorSliceProto, bytes.fromhex("0a00 0a02 1000"), ())
    assert [extent.HasField("length") for extent in part.extent] == [False, True]


@pytest.mark.parametrize(
    "order",
    [
        "import ckptconv.formats.protos; import tensorflow",
        "import tensorflow; import ckptconv.formats.protos",
    ],
)
def test_tensorflow_may_be_loaded_beside(order: str) -> None:
    pytest.importorskip("tensorflow")
    program = f"""
{order}
from tensorflow.core.protobuf import tensor_bundle_pb2, trackable_object_graph_pb2
from ckptconv.formats import protos
from ckptconv.formats.object_graph import ObjectGraph
data = bytes.fromhex({GRAPH.serialize().hex()!r})
theirs = trackable_object_graph_pb2.TrackableObjectGraph.FromString(data)
assert len(theirs.nodes) == 5 and theirs.nodes[3].slot_variables[0].slot_name == "m"
assert ObjectGraph.parse(theirs.SerializeToString(deterministic=True)).serialize() == data
entry = tensor_bundle_pb2.BundleEntryProto(dtype=1, shard_id=3, offset=1 << 40, size=9, crc32c=0xFFFFFFFF)
entry.shape.dim.add(size=1 << 33)
entry.slices.add().extent.add(start=1, length=2)
ours = protos.parse(protos.BundleEntryProto, entry.SerializeToString(), ())
assert ours.SerializeToString() == entry.SerializeToString() and ours.shape.dim[0].size == 1 << 33
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
