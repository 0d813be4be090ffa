"""Batch-norm re-estimation: on images augmented as those that the original learned from."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor.data import load_data
from tersor.errors import DataError, SpecError
from tersor.methods.reestimate import augmentation_of, reestimate_batch_norm
from tersor.methods.steps import augmented
from tersor.models import load_model
from tersor.pipeline import factorize_model, prune_model
from tersor.recipe import run_recipe
from tersor.specs import Factorize, Prune, Recipe
from tersor.specs.finetune import AUGMENTATIONS


@pytest.fixture(scope="module")
def splits():
    return load_data("digits")


@pytest.fixture(scope="module")
def module():
    return load_model("digits_net", seed=3)


def images_of(splits, part):
    return list(splits.batches(part, 64))


def same(one, other):
    held = dict(other.named_buffers())
    return all(torch.equal(value, held[name]) for name, value in one.named_buffers())


def learned_on(module, images, augment):
    """A copy with the statistics of many augmented views."""
    views = images * 4
    return reestimate_batch_norm(module, views, augment=augment, seed=7)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_it_is_the_average_over_augmented_images(module, splits, augment):
    batches = images_of(splits, splits.calibration)
    generator = torch.Generator().manual_seed(5)
    views = [augmented(torch.from_numpy(b), augment, generator).numpy() for b in batches]
    found = reestimate_batch_norm(module, batches, augment=augment, seed=5)
    assert same(found, reestimate_batch_norm(module, views, augment="none"))
    assert same(found, reestimate_batch_norm(module, batches, augment="none")) == (
        augment == "none"
    )


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_statistics_tell_how_the_images_were_augmented(module, splits, augment):
    original = learned_on(module, images_of(splits, splits.train), augment)
    inputs = images_of(splits, splits.calibration)
    assert augmentation_of(original, iter(inputs)) == augment
    changed = copy.deepcopy(original)
    with torch.no_grad():  # what was changed since does not count
        changed.features[0].weight.mul_(0.1)
    found = reestimate_batch_norm(changed, iter(inputs), original=original)
    assert same(found, reestimate_batch_norm(changed, inputs, augment=augment))


def test_every_method_augments_as_the_original_did_or_as_asked(module, splits):
    original = learned_on(module, images_of(splits, splits.train), "crop")
    inputs = images_of(splits, splits.calibration)
    request, thinner = Prune(sparsity=0.6), Factorize(method="svd", size=0.6)
    for change, spec in ((prune_model, request), (factorize_model, thinner)):
        for asked, done in (("auto", "crop"), ("none", "none"), ("flip_crop", "flip_crop")):
            found = change(original, splits, spec, augment=asked)
            assert same(
                found.reestimated, reestimate_batch_norm(found.one_shot, inputs, augment=done)
            )
    fitted = {
        asked: prune_model(
            original,
            splits,
            Prune(sparsity=0.6, reconstruct=True),
            reestimate=False,
            augment=asked,
        ).module
        for asked in ("auto", "crop", "none")
    }
    assert same(fitted["auto"], fitted["crop"]) and not same(fitted["auto"], fitted["none"])
    for asked, done in (("auto", "crop"), ("none", "none")):
        made = run_recipe(original, splits, Recipe((request,), augment=asked))
        assert same(made.module, reestimate_batch_norm(made.module, inputs, augment=done))


def test_what_cannot_be_augmented_is_left_or_refused(module, splits):
    inputs = [np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)]
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    assert augmentation_of(plain, inputs) == "none"
    found = reestimate_batch_norm(plain, inputs, original=plain)
    assert not torch.equal(found[1].running_mean, plain[1].running_mean)
    with pytest.raises(SpecError, match=r"crop.*\(8, 6\).*none"):
        reestimate_batch_norm(plain, inputs, augment="crop")
    with pytest.raises(SpecError, match="flip_crop"):
        reestimate_batch_norm(plain, inputs, augment="flip")
    with pytest.raises(DataError, match="got none"):
        reestimate_batch_norm(module, [], original=module)
    assert augmentation_of(nn.Sequential(nn.Linear(6, 4)), inputs) == "none"
