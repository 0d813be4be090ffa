"""What the options of training do: schedules, hints, slimming, stripes, top-k; each resumes bit-equal."""

import copy
import dataclasses as dc
import math
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tersor.cli import main
from tersor.data import ArraySet, load_data, split
from tersor.errors import DataError, ModelError, SpecError
from tersor.methods import compiling
from tersor.methods import training as loop
from tersor.methods.batches import Batches
from tersor.methods.device import on_device
from tersor.methods.finetune import finetune, training_accuracy
from tersor.methods.gradients import LargestGradients
from tersor.methods.hints import Place, Regressors, Tapped, hint_places, strided_inputs
from tersor.methods.skeletons import Skeletons
from tersor.methods.steps import learning_rate
from tersor.models import load_model
from tersor.specs import Finetune

TINY = Finetune(epochs=3, learning_rate=0.05, batch_size=16, precision="float32", compile="off")
BARE = dc.replace(TINY, epochs=0.25, momentum=0.0, weight_decay=0.0, ema_decay=0.0)  # one step


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in one order: equal runs are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_splits(labels=True):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (80, 1, 8, 8), np.uint8)
    numbers = generator.integers(0, 10, 80)
    train = ArraySet(images[8:], numbers[8:] if labels else None)
    names = tuple(str(i) for i in range(10))
    return split("noise", train, ArraySet(images[:8], numbers[:8]), names, (0.5,), (0.25,))


SPLITS = make_splits()
UNLABELLED = make_splits(labels=False)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def digits_net(seed=3):
    return load_model("digits_net", seed=seed)


def teacher():
    return digits_net(8)


def narrowed(keep=20):
    """A digits_net whose first convolution lost channels by surgery on the user's own modules."""
    module = digits_net()
    first, norm, second = module.features[0], module.features[1], module.features[3]
    kept = torch.arange(keep)
    first.weight = nn.Parameter(first.weight.detach()[kept])
    first.out_channels = norm.num_features = second.in_channels = keep
    norm.weight, norm.bias = (nn.Parameter(p.detach()[kept]) for p in (norm.weight, norm.bias))
    norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]
    second.weight = nn.Parameter(second.weight.detach()[:, kept])
    return module


class Small(nn.Module):
    """A student of another family: half as wide, with a maximum pool at the same size of map."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.b = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, images):
        hidden = self.pool(self.norm(self.a(images)).relu())
        return self.head(self.b(hidden).relu().mean((2, 3)))


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small().eval()


def equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def random_masks(module, density=0.3):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in module.named_parameters()
        if p.ndim > 1
    }


def job_of(module, spec, masks=None, teacher=None):
    return loop.Loop(module, SPLITS, spec, masks or {}, teacher, torch.device("cpu"))


# Schedules


@given(
    epochs=st.floats(0.5, 30),
    longer=st.floats(1, 20),
    num_steps=st.integers(1, 300),
    warmup=st.floats(0, 0.5),
)
def test_rewinding_replays_the_last_part_of_the_original_schedule(
    epochs, longer, num_steps, warmup
):
    rewind = dc.replace(
        TINY,
        epochs=epochs,
        schedule="rewind",
        original_epochs=epochs * longer,
        warmup=warmup,
        small_epochs=0,
    )
    original = dc.replace(rewind, schedule="one_cycle", epochs=epochs * longer, original_epochs=0.0)
    whole = round(num_steps * rewind.original_epochs / epochs)
    replayed = [learning_rate(rewind, step, num_steps) for step in range(num_steps)]
    assert replayed == [learning_rate(original, s, whole) for s in range(whole - num_steps, whole)]


def test_rewinding_starts_at_the_rate_the_original_had_that_long_before_its_end():
    spec = dc.replace(TINY, schedule="rewind", epochs=4, original_epochs=10, learning_rate=0.2)
    # 100 steps an epoch: of 1000 steps the 601st, whose rate is half a cosine's after a rise of a fifth.
    progress = (601 / 1001 - 0.2) / 0.8
    expected = 0.2 * 0.5 * (1 + math.cos(math.pi * progress))
    assert learning_rate(spec, 0, 400) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(spec, 399, 400) < 1e-5 * 0.2 * 2


@given(peak=st.floats(1e-6, 10), num_steps=st.integers(1, 500))
def test_cosine_and_constant_follow_their_formulas(peak, num_steps):
    cosine = dc.replace(TINY, schedule="cosine", learning_rate=peak)
    for step in (0, num_steps // 2, num_steps - 1):
        expected = peak * np.cos(np.pi * np.float64(step) / num_steps / 2) ** 2
        assert learning_rate(cosine, step, num_steps) == pytest.approx(expected, rel=1e-9)
        constant = dc.replace(TINY, schedule="constant", learning_rate=peak)
        assert learning_rate(constant, step, num_steps) == peak


@pytest.mark.parametrize("schedule", ["one_cycle", "rewind", "cosine", "constant"])
def test_the_loop_uses_the_schedules_rate(schedule):
    options = {"original_epochs": 9.0} if schedule == "rewind" else {}
    spec = dc.replace(TINY, schedule=schedule, **options)
    job = job_of(digits_net().train(), spec)
    rates = []
    while job.state.step < job.num_steps:
        rates.append(learning_rate(spec, job.state.step, 12))
        job.guarded_step()
        assert {group["lr"] for group in job.optimizer.param_groups} == {rates[-1]}
    assert len(rates) == 12


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"schedule": "rewind"}, "original_epochs, at least epochs"),
        ({"schedule": "rewind", "original_epochs": 5.0}, "at least epochs .10"),
        ({"original_epochs": 20.0}, "original_epochs is for schedule rewind.*one_cycle"),
        ({"schedule": "cosine", "warmup": 0.1}, "warmup is for schedule one_cycle or rewind"),
        ({"hint_layers": ("a",)}, "hint_layers .* without hints"),
        ({"hints": 1.0, "distill": 0.5}, "leaves no share of the loss for distill"),
        ({"hints": 0.5, "hint_layers": ("",)}, "names of layers"),
        ({"hints": 0.5, "hint_layers": "conv1"}, "names of layers"),
        ({"views": 2, "hints": 0.5}, "views .* hints=0.5"),
        ({"views": 2, "small_epochs": 1.0}, "views .* small_epochs=1.0"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ],
)
def test_options_that_contradict_are_refused_with_the_reason(options, told):
    with pytest.raises(SpecError, match=told):
        Finetune(**options)


# Slimming


def test_slimming_adds_its_subgradient_to_the_gammas_and_to_nothing_else():
    module = digits_net()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        norms[0].weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
        norms[0].weight[3] = 0.0
    spec = dc.replace(BARE, schedule="constant")
    plain = dict(finetune(module, SPLITS, spec).module.named_parameters())
    slim = dict(finetune(module, SPLITS, dc.replace(spec, slimming=0.25)).module.named_parameters())
    gammas = {f"features.{i}.weight" for i in (1, 4, 8)}
    for name, before in module.named_parameters():
        moved = slim[name].detach().double() - plain[name].detach().double()
        expected = -0.05 * 0.25 * before.detach().sign() if name in gammas else torch.zeros(())
        assert torch.allclose(moved, expected.double(), atol=1e-7), name


def test_slimming_shrinks_gammas_and_needs_some():
    def total(module):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        return float(sum(norm.weight.detach().abs().sum() for norm in norms))

    spec = dc.replace(TINY, epochs=6)
    plain, slim = (
        total(finetune(digits_net(), SPLITS, dc.replace(spec, slimming=s)).module)
        for s in (0.0, 0.05)
    )
    assert slim < 0.95 * plain
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ModelError, match="slimming: Sequential has no batch norm"):
        finetune(bare, SPLITS, dc.replace(TINY, slimming=0.1))


# Stripes


def test_the_gradients_of_weights_and_skeletons_are_those_of_autograd():
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1).double()
    skeletons = Skeletons(nn.Sequential(conv), 0.3)
    (weight,), (skeleton,) = skeletons.weights, skeletons.skeletons
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        skeleton.data = torch.randn(6, 3, 3, dtype=torch.float64, generator=generator)
        skeletons.fold_()
    inputs = torch.randn(5, 4, 7, 7, dtype=torch.float64, generator=generator)
    conv(inputs).pow(3).sum().backward()
    skeletons.split_gradients_()
    w, i = weight.detach().clone().requires_grad_(), skeleton.detach().clone().requires_grad_()
    output = nn.functional.conv2d(inputs, w * i[:, None], conv.bias, padding=1, groups=2)
    (output.pow(3).sum() + 0.3 * i.abs().sum()).backward()
    assert torch.allclose(weight.grad, w.grad, rtol=1e-12)
    assert torch.allclose(skeleton.grad, i.grad, rtol=1e-12)
    assert conv.weight.grad is None


@pytest.mark.parametrize("masked", [False, True])
def test_skeletons_are_folded_exactly_into_an_ordinary_network(masked):
    module = digits_net()
    spec = dc.replace(TINY, stripes=0.01, ema_decay=0.0)
    masks = random_masks(module) if masked else {}
    job = job_of(on_device(copy.deepcopy(module), torch.device("cpu")).train(), spec, masks)
    job.run(None, 60, None)
    assert list(job.importance()) == job.skeletons.names
    assert job.skeletons.names == ["features.0", "features.3", "features.7"]
    parts = zip(job.skeletons.names, job.skeletons.weights, job.skeletons.skeletons, strict=True)
    for name, weight, skeleton in parts:
        product = job.student.get_submodule(name).weight
        assert torch.equal(product, weight * skeleton[:, None]), name
        assert torch.equal(job.importance()[name], skeleton.detach().abs())
        assert not torch.equal(skeleton, torch.ones_like(skeleton))
        if masked:
            assert not product[~masks[f"{name}.weight"]].any()
    trained = finetune(module, SPLITS, spec, masks=masks)
    assert list(trained.module.state_dict()) == list(module.state_dict())
    assert equal(trained.module, job.averaged.module)
    for name, importance in trained.stripes.items():
        layer = trained.module.get_submodule(name)
        assert type(layer) is nn.Conv2d
        assert importance.shape == (layer.out_channels, 3, 3)
        assert (importance >= 0).all()


def test_a_stronger_penalty_leaves_smaller_skeletons():
    def size(strength):
        spec = dc.replace(TINY, stripes=strength)
        return sum(i.sum() for i in finetune(digits_net(), SPLITS, spec).stripes.values())

    assert size(0.1) < 0.97 * size(1e-6)


def test_stripes_need_a_kernel_and_are_not_told_without():
    assert finetune(digits_net(), SPLITS, BARE).stripes == {}
    flat = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(ModelError, match="stripes: Sequential has no convolution with a kernel"):
        finetune(flat, SPLITS, dc.replace(TINY, stripes=0.1))


# Hints


def test_stages_end_where_a_layer_makes_the_maps_smaller():
    image = torch.randn(2, 3, 32, 32)
    found = strided_inputs(load_model("resnet18"), image)
    assert {size[0]: place.layer for size, place in found.items()} == {
        32: "layer2.0.conv1",
        16: "layer3.0.conv1",
        8: "layer4.0.conv1",
        4: "avgpool",
    }
    shared = nn.Sequential(nn.Conv2d(1, 2, 1), pool := nn.MaxPool2d(2), nn.ReLU(), pool)
    assert list(strided_inputs(shared, torch.randn(1, 1, 8, 8)).values()) == [
        Place("1", 0),
        Place("1", 1),
    ]


def test_taps_give_what_the_layers_read_and_give():
    module = digits_net()
    images = torch.randn(2, 1, 8, 8)
    seen = {}
    module.features[9].register_forward_hook(
        lambda _, inputs, output: seen.update(reads=inputs[0].clone(), gives=output.clone())
    )
    tapped = Tapped(module, [Place("features.9"), Place("features.9", -1, reads=False)])
    outputs, (reads, gives) = tapped(images)
    assert torch.equal(outputs, module(images))
    assert torch.equal(gives, seen["gives"])
    assert reads.shape == seen["reads"].shape


@pytest.fixture(scope="module")
def unlabelled(digits):
    """A few hundred digits without labels, and with wrong ones."""
    some = digits.train.take(np.arange(320))
    bare = dc.replace(digits, train=ArraySet(some.images, None))
    return bare, dc.replace(digits, train=ArraySet(some.images, some.labels[::-1].copy()))


def feature_distance(student, master, names=(), splits=SPLITS):
    """The distance of the validation images' features after the best 1x1 maps between them."""
    student, master = copy.deepcopy(student).eval(), copy.deepcopy(master).eval()
    images = torch.from_numpy(next(splits.batches(splits.validation, 64)))
    ours, theirs = hint_places(student, master, names, images)
    with torch.no_grad():
        found, wanted = Tapped(student, ours)(images)[1], Tapped(master, theirs)(images)[1]
        return Regressors(found, wanted, ours).distance(found, wanted).item()


@pytest.mark.parametrize("make", [small, digits_net])
def test_hints_alone_draw_the_features_to_the_teachers_without_labels(make, unlabelled):
    bare, wrong = unlabelled
    spec = dc.replace(TINY, hints=1.0, epochs=10, augment="none", ema_decay=0.5)
    student = make()
    trained = finetune(student, bare, spec, teacher=teacher())
    before, after = (feature_distance(m, teacher(), splits=bare) for m in (student, trained.module))
    assert after < 0.9 * before
    assert list(trained.module.state_dict()) == list(student.state_dict())
    hooks = [m for m in trained.module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert equal(finetune(make(), wrong, spec, teacher=teacher()).module, trained.module)


def test_hints_by_name_pair_layers_of_both_networks(unlabelled):
    names = ("pool=features.6",)
    spec = dc.replace(TINY, hints=1.0, hint_layers=names, epochs=10, augment="none", ema_decay=0.5)
    trained = finetune(small(), unlabelled[0], spec, teacher=teacher()).module
    before, after = (
        feature_distance(m, teacher(), names, unlabelled[0]) for m in (small(), trained)
    )
    assert after < 0.9 * before


def test_a_network_hinted_by_itself_has_no_distance():
    assert feature_distance(digits_net(), digits_net()) == 0
    assert 0 < feature_distance(narrowed(), digits_net()) < 1


def test_the_regressor_starts_as_the_least_squares_fit():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(4, 3, 5, 5, generator=generator)
    mixing = torch.randn(6, 3, generator=generator)
    wanted = torch.einsum("oc,nchw->nohw", mixing, own) + 2
    regressors = Regressors([own], [wanted], [Place("a")])
    assert regressors.distance([own], [wanted]).item() < 1e-5
    assert torch.allclose(regressors.maps[0].weight, mixing, atol=0.02)


@pytest.mark.parametrize(
    ("student", "layers", "told"),
    [
        (small, ("nothing",), "the student Small has no layer 'nothing'"),
        (small, ("poole=features.0",), "Did you mean 'pool'"),
        (small, ("pool=feature.0",), "the teacher DigitsNet has no layer 'feature.0'"),
        (small, ("a=classifier.0",), "only their channels may differ"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (), "no strided stage in common"),
    ],
)
def test_hints_that_fit_nothing_are_refused(student, layers, told):
    spec = dc.replace(TINY, hints=0.5, hint_layers=layers)
    with pytest.raises(ModelError, match=told):
        finetune(student(), SPLITS, spec, teacher=teacher())


def test_hints_need_a_teacher_and_labels_where_a_share_is_theirs():
    with pytest.raises(ModelError, match=r"hints=0\.5 needs a teacher"):
        finetune(digits_net(), SPLITS, dc.replace(TINY, hints=0.5))
    with pytest.raises(DataError, match="has none"):
        finetune(digits_net(), UNLABELLED, dc.replace(TINY, hints=0.5), teacher=teacher())
    both = dc.replace(TINY, hints=0.5, distill=1.0, epochs=1)
    assert finetune(digits_net(), UNLABELLED, both, teacher=teacher()).history


# The largest gradients


@given(
    size=st.integers(1, 40),
    share=st.floats(0.01, 0.99),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 1000),
)
def test_largest_gradients_follow_the_algorithm_and_send_exact_counts(size, share, momentum, seed):
    generator = np.random.default_rng(seed)
    parameter = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    largest = LargestGradients([parameter], share, momentum)
    velocity = waiting = np.zeros(size)
    count = max(1, round(share * size))
    for _ in range(5):
        gradient = generator.standard_normal(size)
        parameter.grad = torch.from_numpy(gradient.copy())
        largest.compress_()
        # Algorithm 4 of the paper in its Nesterov form.
        velocity = momentum * velocity + gradient
        waiting = waiting + gradient + momentum * velocity
        chosen = np.argsort(-np.abs(waiting))[:count]
        sent = np.zeros(size)
        sent[chosen] = waiting[chosen]
        velocity, waiting = velocity * (sent == 0), waiting * (sent == 0)
        assert np.allclose(parameter.grad.numpy(), sent, rtol=1e-12, atol=0)
        assert np.count_nonzero(parameter.grad.numpy()) == count


def test_nothing_of_a_gradient_is_lost_without_momentum():
    parameter = nn.Parameter(torch.zeros(3, 50, dtype=torch.float64))
    largest = LargestGradients([parameter], 0.1, 0.0)
    generator = torch.Generator().manual_seed(0)
    given_sum = sent_sum = torch.zeros(3, 50, dtype=torch.float64)
    for _ in range(20):
        parameter.grad = torch.randn(3, 50, dtype=torch.float64, generator=generator)
        given_sum = given_sum + parameter.grad
        largest.compress_()
        sent_sum = sent_sum + parameter.grad
    assert torch.allclose(sent_sum + largest.get_buffer("waiting_0"), given_sum, rtol=1e-12)


def test_a_step_moves_the_chosen_weights_alone():
    spec = dc.replace(BARE, gradient_topk=0.01)
    before = dict(digits_net().named_parameters())
    masks = random_masks(digits_net())
    for held in ({}, masks):
        start = digits_net()
        for name, mask in held.items():
            start.get_parameter(name).data.mul_(mask)
        after = dict(finetune(start, SPLITS, spec, masks=held).module.named_parameters())
        for name, parameter in start.named_parameters():
            moved = int((after[name] != parameter).sum())
            if parameter.ndim > 1:
                assert moved <= max(1, round(0.01 * parameter.numel())), name
            if name in held:
                assert moved > 0, "what is masked does not use up the choice"
    assert before.keys() == after.keys()


def test_a_hundredth_of_the_gradients_still_learns_the_digits(digits):
    spec = dc.replace(TINY, epochs=6, batch_size=64, learning_rate=0.1, augment="crop")
    trained = finetune(digits_net(), digits, dc.replace(spec, gradient_topk=0.01))
    assert training_accuracy(trained.module, digits, digits.validation) > 0.8


# As it will be used


def test_a_step_in_eval_mode_follows_the_gradient_of_the_network_as_it_is_used():
    torch.manual_seed(0)
    start = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Dropout(0.5), nn.Linear(216, 10)
    )
    start[1].running_mean.uniform_(-1, 1)
    start[1].running_var.uniform_(0.5, 2)
    spec = dc.replace(BARE, eval_mode=True, schedule="constant", label_smoothing=0.0)
    learned = finetune(start, SPLITS, spec).module
    inputs, labels = Batches(SPLITS, spec, torch.device("cpu")).at(0)
    expected = copy.deepcopy(start).eval()
    functional.cross_entropy(expected(inputs), labels).backward()
    for (name, before), after in zip(
        expected.named_parameters(), learned.parameters(), strict=True
    ):
        step = before - spec.learning_rate * before.grad
        assert not torch.equal(before, after), name
        torch.testing.assert_close(after.detach(), step.detach(), rtol=1e-5, atol=1e-6)
    for (name, before), after in zip(start.named_buffers(), learned.buffers(), strict=True):
        assert torch.equal(before, after), name


def test_near_its_teacher_a_network_learns_better_as_it_will_be_used(digits):
    """A network a little away from its teacher: batches' own statistics are noise larger than what is to learn."""
    trained = finetune(digits_net(), digits, dc.replace(TINY, epochs=4, batch_size=64)).module
    moved = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * parameter.std() * noise)
    spec = dc.replace(
        TINY, epochs=2, batch_size=64, learning_rate=1e-3, distill=1.0, augment="none"
    )
    images = torch.from_numpy(np.concatenate(list(digits.batches(digits.validation, 100))))

    def apart(module):
        with torch.no_grad():
            logs = [m.eval()(images).log_softmax(1) for m in (trained, module)]
        return float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean())

    found = {
        mode: apart(
            finetune(moved, digits, dc.replace(spec, eval_mode=mode), teacher=trained).module
        )
        for mode in (True, False)
    }
    assert found[True] < apart(moved)
    assert found[True] < found[False]


# Views


class Counted(nn.Module):
    """A teacher that counts its answers."""

    def __init__(self):
        super().__init__()
        self.network, self.seen = teacher(), []

    def forward(self, images):
        if len(images) == TINY.batch_size:  # else it is only looked at
            self.seen.append(images)
        return self.network(images)

    def __deepcopy__(self, memo):
        return self


def test_cutout_takes_from_images_as_they_are_augmented_and_leaves_their_labels():
    spec = dc.replace(TINY, augment="crop")
    whole = job_of(digits_net(), spec).batches.at(3)
    images, labels = job_of(digits_net(), dc.replace(spec, cutout=0.5)).batches.at(3)
    gone = images != whole[0]
    assert torch.equal(labels, whole[1]) and not images[gone].any()
    assert gone.flatten(1).any(1).float().mean() > 0.9


def test_batches_come_again_after_so_many_epochs_and_not_before():
    batches = job_of(digits_net(), dc.replace(TINY, views=2)).batches
    per_epoch = batches.steps_per_epoch
    anew = job_of(digits_net(), TINY).batches
    for step in range(5 * per_epoch):
        (images, labels), (same, known) = batches.at(step), anew.at(step % (2 * per_epoch))
        assert torch.equal(images, same) and torch.equal(labels, known)
    assert not torch.equal(batches.at(0)[0], batches.at(per_epoch)[0])


@pytest.mark.parametrize("distill", [0.5, 1.0])
def test_a_teacher_answers_each_view_once_and_the_student_learns_the_same(monkeypatch, distill):
    spec = dc.replace(TINY, distill=distill, views=2, epochs=5)
    once, always = Counted(), Counted()
    kept = finetune(digits_net(), SPLITS, spec, teacher=once).module

    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    real = loop.Loop.__init__

    def forgetful(self, *args):
        real(self, *args)
        self._answers = Forgetful()

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "__init__", forgetful)
        asked = finetune(digits_net(), SPLITS, spec, teacher=always).module
    per_epoch = len(SPLITS.train) // TINY.batch_size
    assert (len(once.seen), len(always.seen)) == (2 * per_epoch, 5 * per_epoch)
    assert equal(kept, asked)


# Resuming


class Killed(BaseException):
    pass


OPTIONS = {
    "rewind": dict(schedule="rewind", original_epochs=9.0),
    "cosine": dict(schedule="cosine"),
    "constant": dict(schedule="constant"),
    "hints": dict(hints=0.5, distill=0.5),
    "hints by name": dict(hints=0.5, hint_layers=("classifier.0",)),
    "slimming": dict(slimming=0.01),
    "stripes": dict(stripes=0.01),
    "gradient_topk": dict(gradient_topk=0.05),
    "eval_mode": dict(eval_mode=True),
    "views": dict(views=2, distill=0.5),
    "cutout": dict(cutout=0.5),
    "all": dict(
        hints=0.3, distill=0.5, slimming=1e-3, stripes=1e-3, gradient_topk=0.1, schedule="cosine"
    ),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [digits_net, narrowed])
def test_resumed_after_a_kill_every_option_gives_the_same_bits(
    tmp_path, monkeypatch, options, make
):
    spec = dc.replace(TINY, **options)
    held = dict(masks=random_masks(make()), teacher=teacher())
    whole = finetune(make(), SPLITS, spec, **held)
    path, real = tmp_path / "run.pt", loop.Loop.save

    def kill(self, target):
        real(self, target)
        if self.state.step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Loop, "save", kill)
        finetune(make(), SPLITS, spec, checkpoint=path, checkpoint_seconds=0, **held)
    resumed = finetune(make(), SPLITS, spec, checkpoint=path, **held)
    assert equal(resumed.module, whole.module)
    assert all(torch.equal(resumed.stripes[k], whole.stripes[k]) for k in whole.stripes)
    assert not equal(whole.module, finetune(make(), SPLITS, TINY, masks=held["masks"]).module)


# Interruptions


@pytest.fixture
def interrupts(monkeypatch):
    """Ctrl-C as often as asked for in the middle of the sixth step."""
    times = [1]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    real = Batches.at

    def press(self, step):
        for _ in range(times[0] if step == 5 else 0):
            signal.raise_signal(signal.SIGINT)
        return real(self, step)

    monkeypatch.setattr(Batches, "at", press)
    yield times
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_once_finishes_the_step_and_saves(tmp_path, interrupts):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        finetune(digits_net(), SPLITS, TINY, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.load(path, weights_only=True)["state"]["step"] == 6
    interrupts[0] = 0
    whole = finetune(digits_net(), SPLITS, TINY)
    assert equal(finetune(digits_net(), SPLITS, TINY, checkpoint=path).module, whole.module)


def test_ctrl_c_twice_stops_at_once(tmp_path, interrupts):
    interrupts[0] = 2
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        finetune(digits_net(), SPLITS, TINY, checkpoint=path)
    assert not path.exists()


def test_a_program_that_handles_the_signal_itself_goes_on_doing_so(interrupts):
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        finetune(digits_net(), SPLITS, TINY)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [1]


def test_the_command_ends_with_130_and_goes_on_where_it_was(tmp_path, interrupts, capsys):
    out = tmp_path / "net.safetensors"
    command = ["train", "digits_net", "--data", "digits", "--out", str(out)]
    command += ["--epochs", "0.5", "--batch-size", "64", "--compile", "off"]
    assert main(command) == 130
    assert "interrupted; finished work is kept" in capsys.readouterr().err
    (kept,) = out.with_name(f"{out.name}.steps").rglob("checkpoint*")
    assert torch.load(kept, weights_only=True)["state"]["step"] == 6
    interrupts[0] = 0
    assert main(command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


# A loss that is not finite


@pytest.fixture
def spoiled(monkeypatch):
    """A training whose weights overflow in the steps `at`, as often as `times` says; the steps made."""
    state = {"at": 7, "times": 1, "steps": []}
    real = loop.training_loss
    at = Batches.at

    def watch(self, step):
        state["steps"].append(step)
        return at(self, step)

    def spoil(spec, outputs, labels, target):
        loss = real(spec, outputs, labels, target)
        if state["steps"][-1] == state["at"] and state["times"]:
            state["times"] -= 1
            return loss * math.inf
        return loss

    monkeypatch.setattr(Batches, "at", watch)
    monkeypatch.setattr(loop, "training_loss", spoil)
    return state


def test_a_loss_that_is_not_finite_brings_the_last_finite_state_back_and_is_told(spoiled):
    trained = finetune(digits_net(), SPLITS, TINY)
    assert spoiled["steps"] == [*range(8), *range(12)]
    (note,) = trained.notes
    assert "the loss became inf at step 8 of 12" in note
    assert "back to step 0, and from there 0.25 of the recipe's rate" in note
    assert all(torch.isfinite(v).all() for v in trained.module.state_dict().values())
    spoiled["steps"].clear()
    slower = dc.replace(TINY, learning_rate=TINY.learning_rate * 0.25)
    assert equal(finetune(digits_net(), SPLITS, slower).module, trained.module)


def test_it_goes_back_to_the_last_state_kept_not_to_the_start(spoiled, monkeypatch):
    monkeypatch.setattr(loop, "KEEP_EVERY", 5)
    finetune(digits_net(), SPLITS, TINY)
    assert spoiled["steps"] == [*range(8), *range(5, 12)]
    spoiled.update(at=10, times=2)
    spoiled["steps"].clear()
    assert len(finetune(digits_net(), SPLITS, TINY).notes) == 2
    assert spoiled["steps"] == [*range(11), *range(5, 11), *range(5, 12)]


def test_falls_beyond_the_third_end_the_training(spoiled):
    spoiled["times"] = 4
    with pytest.raises(ModelError, match=r"at step 8 of 12.*3 times.*lower the learning rate"):
        finetune(digits_net(), SPLITS, TINY)


def test_a_loss_that_was_never_finite_blames_the_weights_or_the_images():
    broken = digits_net()
    with torch.no_grad():
        broken.classifier[0].weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="before any step was made: the weights or the images"):
        finetune(broken, SPLITS, TINY)


# Networks that were cut, and compiling


def test_a_network_that_lost_channels_trains_on_with_everything():
    module = narrowed()
    trained = finetune(module, SPLITS, dc.replace(TINY, **OPTIONS["all"]), teacher=digits_net())
    assert type(trained.module) is type(module)
    shapes = [p.shape for p in module.parameters()]
    assert [p.shape for p in trained.module.parameters()] == shapes
    assert trained.module.features[0].out_channels == 20
    assert not equal(trained.module, module)


@pytest.fixture
def pays(monkeypatch):
    monkeypatch.setattr(compiling, "COMPILE_PAYS_AFTER_S", 0.0)


def test_what_cannot_be_compiled_runs_eagerly_and_is_told(monkeypatch, pays):
    def broken(module):
        def fail(*_):
            raise RuntimeError("no compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    trained = finetune(digits_net(), SPLITS, dc.replace(TINY, compile="auto"))
    assert not trained.compiled
    assert trained.notes == ("DigitsNet cannot be compiled: no compiler; it ran eagerly",)
    assert equal(trained.module, finetune(digits_net(), SPLITS, TINY).module)
    with pytest.raises(ModelError, match="no compiler; use compile=off"):
        finetune(digits_net(), SPLITS, dc.replace(TINY, compile="on"))


@pytest.mark.parametrize("slow", [True, False])
def test_the_faster_form_is_kept(monkeypatch, pays, slow):
    forward = compiling.Forward(digits_net(), "auto", "DigitsNet")
    monkeypatch.setattr(torch, "compile", lambda module: module)
    images = torch.zeros(2, 1, 8, 8)
    compiled = []
    for seconds in [9.0, 1.0, 1.0, 60.0, *[2.0 if slow else 0.5] * 3, 9.0, 9.0]:
        forward(images)
        compiled.append(forward.compiled)
        forward.took(seconds, 100)
    assert compiled == [False] * 3 + [True] * 4 + [not slow] * 2
    assert bool(forward.notes) == slow


def test_a_short_training_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: pytest.fail("compiled"))
    assert not finetune(digits_net(), SPLITS, dc.replace(TINY, compile="auto")).compiled


@pytest.mark.slow
def test_a_cut_network_with_hints_compiles_and_learns_alike():
    spec = dc.replace(TINY, hints=0.5, distill=1.0, compile="on", small_size=6, small_epochs=1.0)
    compiled = finetune(narrowed(), SPLITS, spec, teacher=digits_net())
    eager = finetune(narrowed(), SPLITS, dc.replace(spec, compile="off"), teacher=digits_net())
    assert compiled.compiled
    for (name, ours), theirs in zip(
        compiled.module.named_parameters(), eager.module.parameters(), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3), name
