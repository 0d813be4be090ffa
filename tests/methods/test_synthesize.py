"""Inputs from batch norms alone: their statistics are those remembered, and the network answers on them."""

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.errors import ModelError
from tersor.methods.synthesize import synthetic_inputs


@pytest.fixture(scope="module")
def net():
    splits = tersor.load_data("digits")
    recipe = tersor.Finetune(epochs=4, batch_size=64, augment="crop", compile="off")
    return tersor.finetune(tersor.load_model("digits_net"), splits, recipe).module


def distances(module, images):
    """Of each batch norm: mean of |mean - remembered| in remembered standard deviations."""
    found = []

    def watch(part, given):
        mean = given[0].mean((0, 2, 3))
        found.append(float(((mean - part.running_mean).abs() / part.running_var.sqrt()).mean()))

    hooks = [
        p.register_forward_pre_hook(watch)
        for p in module.modules()
        if isinstance(p, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        module(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()
    return np.array(found)


def test_statistics_come_near_and_every_class_is_there(net):
    made = synthetic_inputs(net, (1, 8, 8), 70, steps=60)
    noise = np.random.default_rng(0).standard_normal((70, 1, 8, 8)).astype(np.float32)
    assert made.shape == (70, 1, 8, 8) and made.dtype == np.float32 and np.isfinite(made).all()
    assert (distances(net, made) < 0.5 * distances(net, noise)).all()
    with torch.no_grad():
        answers = net(torch.from_numpy(made)).argmax(1)
    assert len(set(answers.tolist())) == 10


def test_the_seed_decides_and_the_network_is_untouched(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    one, again, other = (synthetic_inputs(net, (1, 8, 8), 20, steps=5, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_a_network_without_batch_norms_says_what_is_needed():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ModelError, match=r"no batch norms.*--data"):
        synthetic_inputs(plain, (1, 8, 8), 4)
