"""What we write, they load: torch, TensorFlow with its manager, and the safetensors library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import safetensors  # noqa: E402
import safetensors.numpy  # noqa: E402
import safetensors.torch  # noqa: E402

import ckptconv  # noqa: E402
from ckptconv.dialects.table import DIALECTS  # noqa: E402
from ckptconv.formats.table import FORMATS  # noqa: E402
from tests.support.command import FIXTURES, convert, convert_here, inspect_here  # noqa: E402
from tests.support.torch_equal import assert_same, sharing  # noqa: E402
from tests.support.write_layout import write_layout  # noqa: E402

PLAIN = FIXTURES / "plain"
MLP = PLAIN / "mlp-adamw" / "run.pt"
DICTIONARIES = sorted(PLAIN.glob("*/run.pt"))


def mlp(seed: int) -> tuple[Any, Any, Any]:
    """A Keras model like the fixture's, its optimizer with variables, and their checkpoint."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu", name="fc1"),
            keras.layers.Dense(4, name="fc2"),
        ]
    )
    optimizer = keras.optimizers.AdamW(0.01, epsilon=1e-7)
    optimizer.build(model.trainable_variables)
    return model, optimizer, tf.train.Checkpoint(model=model, optimizer=optimizer)


def bundle(folder: Path, name: str = "converted-1") -> Path:
    """The fixture's run as a bundle."""
    folder.mkdir(exist_ok=True)
    fresh = mlp(seed=1)[2].save(str(folder / "fresh" / "ckpt"))
    return convert_here(MLP, folder / name, "--template", fresh)


def dictionary(folder: Path) -> Path:
    """A Keras run that was trained, as a training dictionary, and what its variables hold."""
    model, optimizer, checkpoint = mlp(seed=2)
    for number in range(5):
        x = tf.random.stateless_normal((8, 8), (number, 1))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x)))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    saved = checkpoint.save(str(folder / "run" / "ckpt"))
    settled = ("--set", "epochs=3", "--set", "epoch_convention=count")
    return convert_here(saved, folder / "converted.pt", "--template", MLP, *settled)


def torch_mlp(**options: Any) -> tuple[Any, Any]:
    model = torch.nn.Sequential()
    model.add_module("fc1", torch.nn.Linear(8, 16))
    model.add_module("relu", torch.nn.ReLU())
    model.add_module("fc2", torch.nn.Linear(16, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, **options)


class TestTorch:
    @pytest.mark.parametrize("mmap", [False, True])
    def test_a_converted_run_has_the_source_s_values(self, mmap: bool, tmp_path: Path) -> None:
        path = dictionary(tmp_path)
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        reader = tf.train.load_checkpoint(str(tmp_path / "run" / "ckpt-1"))

        def stored(key: str) -> np.ndarray:
            return np.asarray(reader.get_tensor(key + "/.ATTRIBUTES/VARIABLE_VALUE"))

        state = loaded["optimizer_state_dict"]["state"]
        for place, name in enumerate(("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")):
            weight = loaded["model_state_dict"][name]
            np.testing.assert_array_equal(weight.numpy(), stored(f"optimizer/_trainable_variables/{place}").T)
            for slot, key in enumerate(("exp_avg", "exp_avg_sq")):
                want = stored(f"optimizer/_variables/{2 + 2 * place + slot}").T
                if want.shape != weight.shape:
                    pytest.fail(f"the order of Keras' slots has changed: {want.shape}")
                np.testing.assert_array_equal(state[place][key].numpy(), want)
            assert float(state[place]["step"]) == 5

    @pytest.mark.parametrize("source", DICTIONARIES, ids=lambda path: path.parent.name)
    def test_mapped_and_not_they_are_alike_and_share_storages(self, source: Path, tmp_path: Path) -> None:
        written = convert_here(source, tmp_path / "out.pt")
        before = torch.load(source, weights_only=True)
        for mmap in (False, True):
            after = torch.load(written, weights_only=True, mmap=mmap)
            assert_same(before, after)
            assert sharing(before) == sharing(after)

    def test_tied_weights_are_one_storage_of_another_dtype_too(self, tmp_path: Path) -> None:
        source = PLAIN / "tied" / "run.pt"
        before = torch.load(source, weights_only=True)
        tied = torch.load(source, weights_only=True)["state_dict"]
        assert tied["head.weight"].data_ptr() == tied["embed.weight"].data_ptr()
        for arguments in (
            (),
            ("--dtype", "bfloat16", "--allow", "state-dropped", "--to", "pytorch:state-dict"),
        ):
            name = "out.pt" if not arguments else "half.pt"
            loaded = torch.load(
                convert_here(source, tmp_path / name, *arguments), weights_only=True, mmap=True
            )
            weights = loaded.get("state_dict", loaded)
            assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()
            assert weights["inner.weight"].data_ptr() != weights["embed.weight"].data_ptr()
            dtype = torch.float32 if not arguments else torch.bfloat16
            assert torch.equal(weights["embed.weight"], before["state_dict"]["embed.weight"].to(dtype))

    @pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
    def test_every_implementation_of_adam_goes_on_alike(self, options: Any, tmp_path: Path) -> None:
        """Fused Adam walks parameter and moments side by side in memory: strides matter to it."""
        path = dictionary(tmp_path)
        reached = []
        for chosen in (options, {"foreach": False}):
            loaded = torch.load(path, weights_only=True)
            model, optimizer = torch_mlp(**chosen)
            model.load_state_dict(loaded["model_state_dict"])
            optimizer.load_state_dict(loaded["optimizer_state_dict"])
            optimizer.param_groups[0].update({"fused": None, "foreach": None} | chosen)
            for param in model.parameters():
                assert optimizer.state[param]["exp_avg"].stride() == param.stride()
            torch.manual_seed(3)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 8)).pow(2).mean().backward()
                optimizer.step()
            reached.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        torch.testing.assert_close(*reached, rtol=0, atol=1e-6)


class TestTensorFlow:
    def test_restore_consumes_everything(self, tmp_path: Path) -> None:
        converted = bundle(tmp_path)
        source = torch.load(MLP, weights_only=True)
        model, optimizer, checkpoint = mlp(seed=3)
        checkpoint.restore(str(converted)).assert_consumed().assert_existing_objects_matched()
        assert int(optimizer.iterations) == 9
        for layer, name in zip(model.layers, ("fc1", "fc2"), strict=True):
            weights = source["model_state_dict"]
            np.testing.assert_array_equal(layer.kernel.numpy(), weights[f"{name}.weight"].numpy().T)
            np.testing.assert_array_equal(layer.bias.numpy(), weights[f"{name}.bias"].numpy())

    def test_the_reader_lists_the_template_s_keys_and_our_note(self, tmp_path: Path) -> None:
        converted = bundle(tmp_path)
        ours, theirs = (
            tf.train.load_checkpoint(str(path)) for path in (converted, tmp_path / "fresh" / "ckpt-1")
        )
        assert set(ours.get_variable_to_shape_map()) - set(theirs.get_variable_to_shape_map()) == {
            "ckptconv/note"
        }
        for key, shape in theirs.get_variable_to_shape_map().items():
            assert ours.get_variable_to_shape_map()[key] == shape
            assert ours.get_variable_to_dtype_map()[key] == theirs.get_variable_to_dtype_map()[key]
            ours.get_tensor(key)
        assert [name for name, _ in tf.train.list_variables(str(converted))]

    def test_a_manager_goes_on_numbering(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        converted = bundle(folder, "ckpt-9")
        model, _, checkpoint = mlp(seed=4)
        manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=2)
        assert manager.latest_checkpoint == str(converted)
        checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        assert Path(manager.save()).name == "ckpt-10"
        for variable in model.trainable_variables:
            variable.assign_add(tf.ones_like(variable))
        assert [Path(manager.save()).name for _ in range(2)] == ["ckpt-11", "ckpt-12"]
        assert [Path(path).name for path in manager.checkpoints] == ["ckpt-11", "ckpt-12"]
        assert inspect_here(folder)["progress"]["step"]["value"] == 9
        # what the manager did not write itself it does not delete
        assert converted.with_suffix(".index").exists()

    def test_into_a_folder_where_a_run_is(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        _, optimizer, checkpoint = mlp(seed=5)
        optimizer.iterations.assign(3)
        manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=5)
        names = [Path(manager.save()).name for _ in range(2)]
        bundle(folder, "ckpt-3")
        later = tf.train.CheckpointManager(mlp(seed=6)[2], str(folder), max_to_keep=5)
        assert Path(later.latest_checkpoint).name == "ckpt-3"
        kept = [Path(p).name for p in tf.train.get_checkpoint_state(str(folder)).all_model_checkpoint_paths]
        assert kept == [*names, "ckpt-3"]


class TestSafetensors:
    @pytest.mark.parametrize("source", DICTIONARIES, ids=lambda path: path.parent.name)
    def test_its_torch_loader(self, source: Path, tmp_path: Path) -> None:
        written = convert_here(source, tmp_path / "weights.safetensors")
        loaded = safetensors.torch.load_file(written)
        run = torch.load(source, weights_only=True)
        keys = ("model", "model_state_dict", "state_dict", "module", "net")
        (weights,) = [run[key] for key in keys if key in run]
        weights = {
            key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in weights.items()
        }
        aliases = set(weights) - set(loaded)
        assert set(loaded) <= set(weights)
        if source.parent.name == "tied":
            assert len(aliases) == 1
            with safetensors.safe_open(written, "pt") as file:
                (alias,) = aliases
                assert torch.equal(loaded[file.metadata()[alias]], weights[alias])
        else:
            assert not aliases
        for name, tensor in loaded.items():
            assert (tensor.dtype, tensor.shape) == (weights[name].dtype, weights[name].shape)
            assert torch.equal(tensor, weights[name])

    def test_its_model_loader_takes_tied_weights(self, tmp_path: Path) -> None:
        class Tied(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = torch.nn.Embedding(8, 8)
                self.inner = torch.nn.Linear(8, 8)
                self.head = torch.nn.Linear(8, 8, bias=False)
                self.head.weight = self.embed.weight

        source = PLAIN / "tied" / "run.pt"
        written = convert_here(source, tmp_path / "weights.safetensors")
        model = Tied()
        assert safetensors.torch.load_model(model, written) == (set(), [])
        expected = torch.load(source, weights_only=True)["state_dict"]
        assert torch.equal(model.head.weight, expected["head.weight"])
        assert torch.equal(model.inner.bias, expected["inner.bias"])

    def test_its_numpy_loader_takes_a_keras_run(self, tmp_path: Path) -> None:
        model, _, checkpoint = mlp(seed=7)
        saved = checkpoint.save(str(tmp_path / "ckpt"))
        written = convert(saved, tmp_path / "weights.safetensors")
        loaded = safetensors.numpy.load_file(written)
        by_bytes = {value.tobytes(): value.shape for value in loaded.values()}
        nonzero = [v.numpy() for v in model.trainable_variables if np.any(v.numpy())]
        assert len(nonzero) == 2
        assert all(by_bytes.get(value.tobytes()) == value.shape for value in nonzero)
        assert len(loaded) == 4

    def test_shards(self, tmp_path: Path) -> None:
        source = PLAIN / "conv-bn-embedding" / "run.pt"
        whole = safetensors.torch.load_file(convert_here(source, tmp_path / "whole.safetensors"))
        checkpoint = ckptconv.open(tmp_path / "whole.safetensors")
        raw = DIALECTS["safetensors", "weights"].lower(checkpoint)
        raw = replace(raw, attributes={**raw.attributes, "shard_nbytes": 300})
        target = tmp_path / "sharded"
        target.mkdir()
        write_layout(FORMATS["safetensors"].layout(raw, target), target)
        index = json.loads((target / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2
        parts = {name: safetensors.torch.load_file(target / name) for name in files}
        joined = {name: parts[file][name] for name, file in index["weight_map"].items()}
        assert sum(len(part) for part in parts.values()) == len(joined) == len(whole)
        assert all(torch.equal(joined[name], whole[name]) for name in whole)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
        # and on, from shards on the command line
        again = safetensors.torch.load_file(convert_here(target, tmp_path / "again.safetensors"))
        assert sorted(again) == sorted(whole)
        assert all(torch.equal(again[name], whole[name]) for name in whole)
