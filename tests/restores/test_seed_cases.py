"""The complaint that the project began with, row by row, and what becomes of each case through ckptconv.

"Value in checkpoint could not be found in the restored object: (root).optimizer.iter": for each row the real
framework makes the call, and what `doctor` says of that very file is compared. The failures of current
releases end with the right iterations, weights and moments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("torch", "tensorflow", "tf_keras", "h5py", "lightning", "transformers", "accelerate"):
    pytest.importorskip(needed)

import ckptconv  # noqa: E402
from ckptconv import doctor  # noqa: E402
from ckptconv.catalog.restores import Restore  # noqa: E402
from ckptconv.document import Known, value_of  # noqa: E402
from tests.restores import calls, files, outcome, torch_calls  # noqa: E402
from tests.restores.outcome import STEPS, Outcome  # noqa: E402
from tests.restores.test_mends import Program  # noqa: E402
from tests.support.command import FIXTURES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ALL, NOTHING = ("restored", "restored", "restored"), ("zero", "kept", "zero")
WEIGHTS_ALONE, REFUSED = ("zero", "restored", "zero"), ("refused", "kept", "zero")
KERNELS = (4, 4)

MATRIX: dict[str, tuple[tuple[str, str, str], str]] = {
    # loaded into a model that is not compiled; it is compiled then; it was compiled before
    "prefix-uncompiled": (WEIGHTS_ALONE, "later"),
    "prefix-compile-after": (ALL, "none"),
    "prefix-compiled": (ALL, "later"),
    "new-prefix-uncompiled": (WEIGHTS_ALONE, "later"),
    "new-prefix-compile-after": (ALL, "none"),
    "new-prefix-compiled": (ALL, "none"),
    # only the model is asked for; the optimizer has another name
    "legacy-model-only": (WEIGHTS_ALONE, "later"),
    "tf-keras-model-only": (WEIGHTS_ALONE, "later"),
    "keras3-model-only": (WEIGHTS_ALONE, "later"),
    "legacy-renamed": (WEIGHTS_ALONE, "later"),
    "tf-keras-renamed": (WEIGHTS_ALONE, "later"),
    "keras3-renamed": (WEIGHTS_ALONE, "later"),
    # the optimizer is not built yet
    "legacy-unbuilt": (ALL, "later"),
    "tf-keras-unbuilt": (ALL, "none"),
    "keras3-unbuilt": (ALL, "none"),
    # between the optimizers of Keras 2
    "legacy-into-new": (REFUSED, "error"),
    "tf-keras-into-legacy": (WEIGHTS_ALONE, "later"),
    # from Keras 2 to Keras 3
    "legacy-into-keras3": (NOTHING, "later"),
    "tf-keras-into-keras3-unbuilt": (("restored", "kept", "wrong"), "later"),
    "tf-keras-into-keras3-built": (("refused", "kept", "wrong"), "error"),
    "prefix-load-weights-keras3": (REFUSED, "error"),
    "legacy-load-weights-keras3": (REFUSED, "error"),
    # whole models across the generations
    "archive-tf-keras": (REFUSED, "error"),
    "tf-archive-keras3": (REFUSED, "error"),
    "h5-tf-keras": (REFUSED, "error"),
    "tf-h5-keras3": (REFUSED, "error"),
    # a file that has only the edge `iterations`
    "counter-same": (WEIGHTS_ALONE, "later"),
    "counter-unbuilt": (WEIGHTS_ALONE, "later"),
    "counter-into-tf-keras": (NOTHING, "later"),
    "counter-into-legacy": (NOTHING, "later"),
    "counter-alone": (("restored", "restored", "zero"), "none"),
    # files that do not hold the step
    "no-optimizer-tf-keras": (WEIGHTS_ALONE, "none"),
    "h5-weights-tf-keras": (WEIGHTS_ALONE, "none"),
    "legacy-archive-load-model": (WEIGHTS_ALONE, "none"),
    "export-weights": (WEIGHTS_ALONE, "none"),
}
"""Call -> (step, weights, optimizer state) and what one is told, as it was measured first."""

Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def make(file: str) -> tuple[Path, Any]:
        return files.FILES[file](tmp_path_factory.mktemp(file))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_the_doctor_says_what_happens(name: str, made: Made) -> None:
    file, _ = calls.CALLS[name]
    path, saved = made(file)
    (step, weights, state), signal = MATRIX[name]
    (said,) = [restore for restore in doctor.diagnose(path).restores if restore.name == name]
    assert (said.step, said.weights, said.state, said.signal) == (step, weights, state, signal)
    found = calls.observed(name, path, saved)
    if signal == "error":  # what a refusal has touched before it failed is not looked at
        assert (found.step, found.signal) == (step, signal)
    else:
        assert found == Outcome(step, weights, state, signal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "edge"), [("checkpoint-legacy", "iter"), ("checkpoint-keras3", "_iterations")]
)
def test_the_name_that_it_says_leads_to_the_step(file: str, edge: str, made: Made) -> None:
    """TensorFlow reads the counter alone under it."""
    import tensorflow as tf

    path, _ = made(file)
    step = doctor.diagnose(path).step
    assert isinstance(step, Known)
    assert step.source == f"optimizer/{edge}"
    counter = tf.Variable(0, dtype=tf.int64)
    tf.train.Checkpoint(optimizer=tf.train.Checkpoint(**{edge: counter})).restore(str(path)).expect_partial()
    assert counter.numpy() == step.value == STEPS


@pytest.mark.slow
def test_what_waits_is_put_in_place_when_it_is_made(tmp_path: Path) -> None:
    import tensorflow as tf

    saved, kept = files.trained("keras3"), calls.Kept()
    checkpoint = tf.train.Checkpoint(model=saved.model, optimizer=saved.optimizer)
    path = Path(checkpoint.save(str(tmp_path / "ckpt")))
    run = calls.restore("keras3", built=False)(path, kept)
    assert int(run.optimizer.iterations.numpy()) == STEPS
    kept.status.assert_existing_objects_matched()
    with pytest.raises(AssertionError):
        kept.status.assert_consumed()
    files.build(run)
    kept.status.assert_consumed()
    assert all(np.array_equal(a, b) for a, b in zip(files.slots(run), saved.slots, strict=True))


def through(path: Path, folder: Path, build: Callable[[], Program]) -> Any:
    """What Keras 3 holds after the file was converted for it and restored."""
    import tensorflow as tf

    template = build()
    fresh = tf.train.Checkpoint(model=template.model, optimizer=template.optimizer).save(
        str(folder / "fresh")
    )
    ckptconv.convert(path, folder / "ckpt-1", template=fresh)
    return build().resume(str(folder / "ckpt-1"))


def keras_3() -> Program:
    return Program("keras3", "Adam")


def assert_all_of_it(found: Any, weights: list[Any], state: list[Any]) -> None:
    assert found.step == STEPS
    for mine, theirs in ((found.weights, weights), (found.state, state)):
        assert theirs
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.slow
def test_r1_a_legacy_optimizer_of_keras_2_in_keras_3(made: Made, tmp_path: Path) -> None:
    path, saved = made("checkpoint-legacy")
    assert calls.observed("legacy-into-keras3", path, saved) == Outcome(*NOTHING, "later")
    assert_all_of_it(through(path, tmp_path, keras_3), saved.weights, saved.slots)


class Even(Program):
    """A model whose kernels have one shape, so that nothing stops moments in the wrong place."""

    def __init__(self, generation: str) -> None:
        keras = files.keras_of(generation)
        keras.utils.set_random_seed(0 if generation == "tf_keras" else 1)
        self.framework = generation
        layers = [keras.layers.Dense(KERNELS[1], use_bias=False) for _ in range(2)]
        self.model = keras.Sequential([keras.Input(KERNELS[:1]), *layers])
        self.optimizer = keras.optimizers.Adam(0.01)
        self.model.compile(self.optimizer, "mse")
        self.optimizer.build(self.model.trainable_variables)


@pytest.mark.slow
def test_r2_a_new_optimizer_of_keras_2_in_keras_3(tmp_path: Path) -> None:
    import tensorflow as tf

    source = Even("tf_keras")
    source.model.fit(files.X, files.Y, batch_size=16, epochs=STEPS, verbose=0)
    checkpoint = tf.train.Checkpoint(model=source.model, optimizer=source.optimizer)
    path = Path(checkpoint.write(str(tmp_path / "ckpt")))
    weights, moments = source.model.get_weights(), files.slots(files.Run(source.model, source.optimizer))
    first, second = moments[:2], moments[2:]

    native = Even("keras3")
    tf.train.Checkpoint(model=native.model, optimizer=native.optimizer).restore(str(path))
    held = files.slots(files.Run(native.model, native.optimizer))
    assert int(native.optimizer.iterations.numpy()) == STEPS
    assert np.array_equal(held[0], second[0])  # a first moment is a second one now
    assert np.array_equal(held[2], first[1])  # and a second moment another one's first

    found = through(path, tmp_path, lambda: Even("keras3"))
    assert_all_of_it(found, weights, moments)


@pytest.mark.slow
def test_r3_a_weights_file_in_a_freshly_compiled_model(made: Made, tmp_path: Path) -> None:
    path, saved = made("weights-h5-keras3")
    assert calls.observed("weights-h5-unbuilt", path, saved) == Outcome(*WEIGHTS_ALONE, "warning")
    assert_all_of_it(through(path, tmp_path, keras_3), saved.weights, saved.slots)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "call"), [("h5-keras3", "h5-load-weights"), ("h5-tf-keras", "tf-h5-load-weights")]
)
def test_r4_weights_of_a_whole_h5_model(file: str, call: str, made: Made, tmp_path: Path) -> None:
    path, saved = made(file)
    assert calls.observed(call, path, saved) == Outcome(*WEIGHTS_ALONE, "none")
    assert_all_of_it(through(path, tmp_path, keras_3), saved.weights, saved.slots)


@pytest.mark.slow
def test_r5_an_h5_model_with_a_loss_by_name(tmp_path: Path) -> None:
    keras = files.keras_of("keras3")
    run = files.fresh("keras3", 0)
    run.model.compile(run.optimizer, "mse")
    run.model.fit(files.X, files.Y, batch_size=16, epochs=STEPS, verbose=0)
    run.model.save(str(tmp_path / "m.h5"))
    with pytest.raises(Exception, match="deserialize"):
        keras.models.load_model(str(tmp_path / "m.h5"))
    assert value_of(doctor.diagnose(tmp_path / "m.h5").step) == STEPS
    found = through(tmp_path / "m.h5", tmp_path, keras_3)
    assert_all_of_it(found, run.model.get_weights(), files.slots(run))


@pytest.mark.slow
def test_r6_numbers_that_torch_s_own_tool_made_texts(tmp_path: Path) -> None:
    """`dcp_to_torch_save`: torch restores no state and tells nothing; through ckptconv all comes back."""
    path, saved = torch_calls.FILES["torch-texts"](tmp_path)
    found = torch_calls.observed("torch-texts-load", path, saved)
    assert found == Outcome(*WEIGHTS_ALONE, "none")
    (said,) = [row for row in doctor.diagnose(path).restores if row.name == "torch-texts-load"]
    assert (said.step, said.weights, said.state, said.signal) == (*WEIGHTS_ALONE, "none")
    fresh = torch_calls.fresh()
    spec = ckptconv.pytorch.describe(fresh.model, fresh.optimizer)
    ckptconv.write_skeleton(spec, tmp_path / "fresh.json")
    ckptconv.convert(path, tmp_path / "run.pt", template=tmp_path / "fresh.json")
    again = torch_calls.load_state_dict()(tmp_path / "run.pt")
    assert_all_of_it(again, saved.weights, saved.state)


OF_KERAS_3_3 = FIXTURES / "keras3/keras-3.3-amsgrad/artifact/ckpt-1"
"""By the real Keras 3.3, whose edge is `iterations`; the first of its `_variables` is the same variable."""


def model_of_the_fixture(generation: str, seed: int = 1, *, built: bool = False) -> files.Run:
    keras = files.keras_of("keras3" if generation == "keras3" else "tf_keras")
    keras.utils.set_random_seed(seed)
    norm = keras.layers.BatchNormalization()
    dense = [keras.layers.Dense(units) for units in (4, 4, 2)]
    model = keras.Sequential([keras.Input((4,)), dense[0], norm, *dense[1:]])
    legacy = generation == "tf_keras_legacy"
    optimizers = keras.optimizers.legacy if legacy else keras.optimizers
    run = files.Run(model, optimizers.Adam(0.01, amsgrad=True))
    if built:
        files.build(run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("said", doctor.diagnose(OF_KERAS_3_3).restores, ids=lambda said: said.name)
def test_a_counter_under_its_name_of_before_keras_3_5(said: Restore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras 3.1 to 3.4 call it `iterations`; it comes back by its other name, `_variables/0`."""
    import tensorflow as tf

    found = doctor.diagnose(OF_KERAS_3_3)
    assert isinstance(found.step, Known)
    assert found.step.source == "optimizer/iterations"
    reader = tf.train.load_checkpoint(str(OF_KERAS_3_3))

    def stored(path: str) -> np.ndarray:
        return reader.get_tensor(f"{path}/.ATTRIBUTES/VARIABLE_VALUE")

    trained = [stored(f"optimizer/_trainable_variables/{number}") for number in range(8)]
    seen = [stored(f"model/_functional/_operations/2/moving_{what}") for what in ("mean", "variance")]
    moments = [stored(f"optimizer/_variables/{2 + 2 * i + which}") for which in (0, 1) for i in range(8)]
    monkeypatch.setattr(calls, "fresh", model_of_the_fixture)
    monkeypatch.setattr(calls, "STEPS", found.step.value)
    saved = files.Run(None, None, [*trained[:4], *seen, *trained[4:]], moments)
    happened = calls.observed(said.name, OF_KERAS_3_3, saved)
    if said.signal == "error":
        assert happened == outcome.REFUSED
    else:
        assert happened == Outcome(said.step, said.weights, said.state, said.signal)
