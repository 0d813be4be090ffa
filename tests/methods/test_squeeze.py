"""The smallest file of a network: what is asked is what is written, and it computes what was judged."""

import dataclasses as dc

import numpy as np
import pytest
import torch

import tersor
from tersor.artifact import load
from tersor.errors import BudgetError, SpecError
from tersor.methods.squeezing import squeeze
from tersor.specs import Squeeze

PROVENANCE = {"model": "digits_net", "data": "digits"}
LITTLE = {"num_calibration": 128, "augment": "crop", "precision": "float32"}


@pytest.fixture(scope="module")
def splits():
    return tersor.load_data("digits", num_calibration=128)


@pytest.fixture(scope="module")
def net(splits):
    recipe = tersor.Finetune(epochs=8, batch_size=64, augment="crop", compile="off")
    return tersor.finetune(tersor.load_model("digits_net"), splits, recipe).module


@pytest.fixture(scope="module")
def float_bytes(net, splits, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "net.tersor"
    return tersor.write(tersor.export_onnx(net, splits.input_shape), path)


def squeezed(net, splits, **goal):
    return squeeze(net, splits, Squeeze(**LITTLE, **goal), provenance=PROVENANCE)


@pytest.fixture(scope="module")
def eighth(net, splits, float_bytes):
    return squeezed(net, splits, size=str(float_bytes // 8))


def written(found, path):
    return tersor.write(found.graph, path, plan=found.plan, provenance=PROVENANCE)


def test_the_file_is_at_most_what_was_asked_for_and_nearly_that(eighth, float_bytes, tmp_path):
    size = written(eighth, tmp_path / "net.tersor")
    assert size == (tmp_path / "net.tersor").stat().st_size
    assert 0.95 * (float_bytes // 8) <= size <= float_bytes // 8


def test_the_file_computes_what_was_judged_and_goes_back_into_the_class(eighth, splits, tmp_path):
    """Of scales and biases the file keeps a few bits: they are right to 3 %."""
    written(eighth, tmp_path / "net.tersor")
    images = splits.normalise(splits.test.images)
    held = tersor.open_session(load(tmp_path / "net.tersor")).run(images)
    back = tersor.load(tmp_path / "net.tersor", into=tersor.load_model("digits_net"))
    with torch.no_grad():
        judged, found = (
            each.eval()(torch.from_numpy(images)).numpy() for each in (eighth.module, back)
        )
    np.testing.assert_allclose(found, held, atol=1e-4 * np.abs(held).max())
    assert np.sqrt(np.square(held - judged).mean() / np.square(judged).mean()) <= 0.03


def test_a_network_keeps_its_accuracy_at_an_eighth(eighth, net, splits):
    lost = [
        tersor.evaluate(tersor.open_session(each, engine="torch"), splits).accuracy
        for each in (net, eighth.module)
    ]
    assert lost[0] - lost[1] <= 0.02


def test_a_higher_price_takes_fewer_bytes_and_leaves_more_zeros(net, splits):
    bytes_, zeros = [], []
    for price in (1e-7, 1e-5, 1e-3):
        found = squeezed(net, splits, price=price)
        bytes_.append(sum(layer.size_bytes for layer in found.layers.values()))
        zeros.append(sum(int((p == 0).sum()) for p in found.module.parameters() if p.ndim > 1))
        assert found.price == price
    assert bytes_ == sorted(bytes_, reverse=True) and bytes_[0] > bytes_[-1]
    assert zeros == sorted(zeros) and zeros[0] < zeros[-1]


def test_a_drop_is_kept_on_the_validation_images(net, splits):
    found = squeezed(net, splits, drop=2.0)
    lost = [
        tersor.evaluate(tersor.open_session(each, engine="torch"), splits, "validation").accuracy
        for each in (net, found.module)
    ]
    assert 100 * (lost[0] - lost[1]) <= 2.0


def test_labels_are_not_looked_at(net, splits, float_bytes):
    def bare(part):
        return dc.replace(part, labels=None)

    blind = dc.replace(splits, train=bare(splits.train), calibration=bare(splits.calibration))
    size = str(float_bytes // 8)
    one, other = (squeezed(net, each, size=size).graph for each in (splits, blind))
    assert one.SerializeToString() == other.SerializeToString()


def test_weights_that_a_pruning_removed_stay_away(net, splits, float_bytes):
    pruned = tersor.prune(net, tersor.Prune(sparsity=0.5))
    spec = Squeeze(**LITTLE, size=str(float_bytes // 8))
    found = squeeze(pruned.module, splits, spec, masks=pruned.masks)
    held = dict(found.module.named_parameters())
    assert not any(bool(held[name][~mask].any()) for name, mask in pruned.masks.items())


def test_a_training_goes_to_its_size_and_gains(net, splits, float_bytes, tmp_path):
    size = str(float_bytes // 45)
    before = squeezed(net, splits, size=size)
    after = squeezed(net, splits, size=size, epochs=20.0, batch_size=64)
    assert written(after, tmp_path / "net.tersor") <= float_bytes // 45
    images = torch.from_numpy(splits.normalise(splits.test.images))
    with torch.no_grad():
        answers = [each.eval()(images).argmax(1) for each in (net, before.module, after.module)]
    agreeing = [(answers[0] == each).float().mean().item() for each in answers[1:]]
    assert agreeing[1] > agreeing[0], "trained on, it answers more as the original does"


def test_what_cannot_be_is_refused(net, splits, float_bytes):
    with pytest.raises(BudgetError, match="without any code"):
        squeezed(net, splits, size="300")
    with pytest.raises(SpecError, match=r"num_calibration 129.*128"):
        squeeze(net, splits, Squeeze(size="5kB", num_calibration=129))
    pruned = tersor.prune(net, tersor.Prune(sparsity=0.5))
    with pytest.raises(SpecError, match="epochs trains all weights"):
        squeeze(net, splits, Squeeze(size="5kB", epochs=1.0), masks=pruned.masks)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "one goal"),
        ({"size": "5kB", "drop": 1.0}, "size and drop"),
        ({"size": "5 apples"}, "5 apples"),
        ({"size": "0"}, "number"),
        ({"drop": 1.0, "epochs": 1.0}, "size instead of drop"),
        ({"drop": float("nan")}, "finite"),
        ({"size": "5kB", "start": 0.5}, "multiple of the size"),
    ],
)
def test_requests_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(SpecError, match=said):
        Squeeze(**wrong)
