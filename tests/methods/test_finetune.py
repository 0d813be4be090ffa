"""The training loop: what stays zero, what a seed decides, what a kill costs, what is refused."""

import copy
import dataclasses as dc
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.data import ArraySet, load_data, split
from tersor.errors import DataError, ModelError, RunError
from tersor.methods import training as loop
from tersor.methods.batches import Batches
from tersor.methods.finetune import finetune, training_accuracy
from tersor.methods.steps import augmented, cut_out, learning_rate
from tersor.models import load_model
from tersor.specs import Finetune

TINY = Finetune(epochs=3, learning_rate=0.05, batch_size=16, precision="float32", compile="off")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in one order: equal runs are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_splits(count=72, labels=True, shape=(1, 8, 8), classes=10):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count + 8, *shape), np.uint8)
    numbers = generator.integers(0, classes, count + 8)
    train = ArraySet(images[8:], numbers[8:] if labels else None)
    names = tuple(str(i) for i in range(classes))
    test = ArraySet(images[:8], numbers[:8])
    channels = shape[0]
    return split("noise", train, test, names, (0.5,) * channels, (0.25,) * channels)


SPLITS = make_splits()


class Copied(nn.Module):
    """A 1x1 map pooled up to 7x7, dropout, batch norm: all that makes exact resuming hard."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(196, 10))

    def forward(self, images):
        return self.classifier(self.pool(self.features(images)).flatten(1))


def digits_net():
    return load_model("digits_net", seed=3)


def copied():
    torch.manual_seed(0)
    return Copied().eval()


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


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_it_learns_the_digits_within_seconds(digits):
    spec = dc.replace(
        TINY, epochs=5, batch_size=64, learning_rate=0.1, ema_decay=0.9, augment="crop"
    )
    trained = finetune(digits_net(), digits, spec)
    assert training_accuracy(trained.module, digits, digits.test) > 0.9
    assert trained.precision == "float32" and not trained.compiled
    assert len(trained.history) == 5 and trained.seconds > 0
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


@pytest.mark.parametrize("make", [digits_net, copied])
def test_removed_weights_stay_exactly_zero_and_the_kept_ones_learn(make):
    module = make()
    masks = random_masks(module)
    masks["classifier.0.weight" if make is digits_net else "classifier.1.weight"][2] = False
    trained = finetune(module, SPLITS, TINY, masks=masks).module
    after = dict(trained.named_parameters())
    for name, mask in masks.items():
        assert after[name].shape == mask.shape
        assert not after[name][~mask].any()
        kept = after[name][mask]
        assert (kept != 0).float().mean() > 0.9
        before = dict(module.named_parameters())[name][mask]
        assert not torch.equal(kept, before)


def test_the_module_the_teacher_and_the_masks_given_are_left_alone():
    module, teacher = copied().train(), digits_net().train()
    masks = random_masks(module)
    before = [copy.deepcopy(m.state_dict()) for m in (module, teacher)]
    held = {name: mask.clone() for name, mask in masks.items()}
    state = torch.random.get_rng_state()
    trained = finetune(
        module, SPLITS, dc.replace(TINY, distill=0.5, epochs=1), masks=masks, teacher=teacher
    )
    for given_module, state_before in zip((module, teacher), before, strict=True):
        assert given_module.training
        assert all(torch.equal(state_before[k], v) for k, v in given_module.state_dict().items())
        assert all(p.grad is None for p in given_module.parameters())
    assert all(torch.equal(held[name], mask) for name, mask in masks.items())
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is not moved"
    assert not trained.module.training
    assert all(p.grad is None for p in trained.module.parameters())
    assert trained.module.pool.output_size == 7


@pytest.mark.parametrize("make", [digits_net, copied])
def test_the_seed_alone_decides(make):
    first, second = make(), make()
    torch.manual_seed(1)
    first = finetune(first, SPLITS, TINY).module
    torch.manual_seed(2)
    assert equal(first, finetune(second, SPLITS, TINY).module)
    assert not equal(first, finetune(make(), SPLITS, dc.replace(TINY, seed=1)).module)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("make", [digits_net, copied])
@pytest.mark.parametrize("kept_steps", [1, 4, 11, 12])
def test_resumed_after_a_kill_the_weights_are_those_of_an_uninterrupted_run(
    tmp_path, monkeypatch, make, kept_steps
):
    masks = random_masks(make())
    whole = finetune(make(), SPLITS, TINY, masks=masks)
    path = tmp_path / "run.pt"
    real, saved = loop.Loop.save, []

    def kill(self, target):
        real(self, target)
        saved.append(self.state.step)
        if len(saved) == kept_steps:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Loop, "save", kill)
        finetune(make(), SPLITS, TINY, masks=masks, checkpoint=path, checkpoint_seconds=0)
    assert saved[-1] == kept_steps
    shown = []
    resumed = finetune(make(), SPLITS, TINY, masks=masks, checkpoint=path, on_progress=shown.append)
    assert equal(resumed.module, whole.module)
    assert len(resumed.history) == len(whole.history)
    assert all(p.step > kept_steps for p in shown)


def test_an_error_in_the_callers_progress_leaves_a_checkpoint_to_go_on_from(tmp_path):
    whole = finetune(digits_net(), SPLITS, TINY).module
    path = tmp_path / "run.pt"
    for stop_at in (2.0, 3.0):

        def stop(progress, stop_at=stop_at):
            if progress.epoch == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(
                digits_net(), SPLITS, TINY, checkpoint=path, checkpoint_seconds=0, on_progress=stop
            )
    assert equal(finetune(digits_net(), SPLITS, TINY, checkpoint=path).module, whole)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    finetune(digits_net(), SPLITS, TINY, checkpoint=path, checkpoint_seconds=0)
    return path


def test_a_checkpoint_of_another_recipe_is_refused_with_both(checkpoint):
    with pytest.raises(RunError, match=r"another recipe.*epochs=3.*asked for.*epochs=4") as refused:
        finetune(digits_net(), SPLITS, dc.replace(TINY, epochs=4), checkpoint=checkpoint)
    assert "remove it to start anew" in str(refused.value)


def test_a_checkpoint_of_another_network_is_refused(checkpoint):
    with pytest.raises(RunError, match="another network"):
        finetune(copied(), SPLITS, TINY, checkpoint=checkpoint)


def test_a_checkpoint_of_another_pruning_is_refused(checkpoint):
    module = digits_net()
    with pytest.raises(RunError, match="another pruning"):
        finetune(module, SPLITS, TINY, masks=random_masks(module), checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"", b"rubbish", {"spec": 5}, [1], {"spec": repr(TINY)}])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RunError, match=r"run\.pt.*remove it to start anew"):
        finetune(digits_net(), SPLITS, TINY, checkpoint=path)


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_a_checkpoint_that_cannot_be_written_is_told_and_the_old_one_kept(
    checkpoint, monkeypatch, tmp_path, function
):
    before = checkpoint.read_bytes()

    def full(*values):
        raise OSError(28, "No space left on device")

    job = loop.Loop(digits_net(), SPLITS, TINY, {}, None, torch.device("cpu"))
    monkeypatch.setattr(os, function, full)
    with pytest.raises(
        RunError, match=r"cannot be written: No space left.*\d+ bytes of free space"
    ):
        job.save(checkpoint)
    assert checkpoint.read_bytes() == before and list(tmp_path.iterdir()) == [checkpoint]


def test_a_half_written_checkpoint_of_a_killed_training_goes_with_the_next_one(
    checkpoint, tmp_path
):
    (tmp_path / f".tersor-{checkpoint.name}.part").write_bytes(b"half")
    loop.Loop(digits_net(), SPLITS, TINY, {}, None, torch.device("cpu")).save(checkpoint)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_checkpoint_in_a_missing_directory_is_told(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        finetune(
            digits_net(), SPLITS, TINY, checkpoint=tmp_path / "no" / "x.pt", checkpoint_seconds=0
        )


def test_full_distillation_uses_no_labels():
    spec = dc.replace(TINY, distill=1.0)
    train = SPLITS.train
    shuffled = dc.replace(SPLITS, train=ArraySet(train.images, train.labels[::-1].copy()))
    without = dc.replace(SPLITS, train=ArraySet(train.images, None))
    results = [
        finetune(digits_net(), data, spec, teacher=load_model("digits_net", seed=8)).module
        for data in (SPLITS, shuffled, without)
    ]
    assert equal(results[0], results[1]) and equal(results[0], results[2])
    half = dc.replace(spec, distill=0.5)
    teacher = load_model("digits_net", seed=8)
    assert not equal(
        finetune(digits_net(), SPLITS, half, teacher=teacher).module,
        finetune(digits_net(), shuffled, half, teacher=teacher).module,
    )


def test_distillation_moves_the_student_to_its_teacher():
    teacher = load_model("digits_net", seed=8)
    student = digits_net()
    spec = dc.replace(TINY, distill=1.0, epochs=6, ema_decay=0.5, augment="none")
    trained = finetune(student, SPLITS, spec, teacher=teacher).module
    inputs = torch.from_numpy(next(SPLITS.batches(SPLITS.train, 64)))

    def distance(module):
        with torch.no_grad():
            return float((module(inputs).softmax(1) - teacher(inputs).softmax(1)).abs().sum())

    assert distance(trained) < 0.5 * distance(student)


def test_missing_labels_or_a_missing_teacher_are_refused():
    without = dc.replace(SPLITS, train=ArraySet(SPLITS.train.images, None))
    with pytest.raises(DataError, match=r"has none; use distill=1\.0"):
        finetune(digits_net(), without, TINY)
    with pytest.raises(DataError, match="has none"):
        finetune(digits_net(), without, dc.replace(TINY, distill=0.5), teacher=digits_net())
    with pytest.raises(ModelError, match="needs a teacher"):
        finetune(digits_net(), SPLITS, dc.replace(TINY, distill=0.5))


def test_labels_beyond_the_outputs_and_inputs_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"label 9 .*7 outputs"):
        finetune(load_model("digits_net", num_classes=7), SPLITS, TINY)
    with pytest.raises(ModelError, match=r"inputs of \(3, 8, 8\)"):
        finetune(digits_net(), make_splits(shape=(3, 8, 8)), TINY)
    with pytest.raises(ModelError, match=r"outputs of shape \(2, 1, 8, 8\)"):
        finetune(nn.Sequential(nn.Conv2d(1, 1, 1)), SPLITS, TINY)


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        ({"nothing.weight": torch.ones(1, dtype=torch.bool)}, "'nothing.weight'"),
        (
            {"classifier.0.weight": torch.ones(3, 3, dtype=torch.bool)},
            r"classifier\.0\.weight.*3, 3",
        ),
    ],
)
def test_masks_of_another_network_are_refused(masks, told):
    with pytest.raises(ModelError, match=told):
        finetune(digits_net(), SPLITS, TINY, masks=masks)


def test_a_loss_that_is_not_finite_ends_the_training_and_spoils_no_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(ModelError, match=r"the loss became .* at step \d+ of 12 .*learning rate"):
        finetune(
            digits_net(),
            SPLITS,
            dc.replace(TINY, learning_rate=1e25, warmup=0.9),
            checkpoint=path,
            checkpoint_seconds=0,
        )
    if path.exists():
        kept = torch.load(path, weights_only=True)
        for part in ("student", "averaged"):
            assert all(torch.isfinite(v).all() for v in kept[part].values())


def test_progress_counts_up_to_the_end():
    shown = []
    finetune(digits_net(), SPLITS, TINY, on_progress=shown.append)
    assert [p.epoch for p in shown if p.epoch == int(p.epoch)] == [1, 2, 3]
    steps = [p.step for p in shown]
    assert steps == sorted(steps) and steps[-1] == shown[-1].num_steps == 12
    assert shown[-1].left_s == 0 and all(p.images_per_s > 0 for p in shown)


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1.75])
def test_parts_of_an_epoch(epochs):
    shown = []
    finetune(digits_net(), SPLITS, dc.replace(TINY, epochs=epochs), on_progress=shown.append)
    assert shown[-1].step == max(1, round(4 * epochs))


def test_a_batch_larger_than_the_data_is_the_whole_data():
    shown = []
    finetune(digits_net(), SPLITS, dc.replace(TINY, batch_size=5000), on_progress=shown.append)
    assert shown[-1].num_steps == 3


def test_small_images_at_the_start(monkeypatch):
    seen = []
    real = Batches.at

    def watch(self, step):
        inputs, labels = real(self, step)
        seen.append(tuple(inputs.shape[2:]))
        return inputs, labels

    monkeypatch.setattr(Batches, "at", watch)
    finetune(digits_net(), SPLITS, dc.replace(TINY, small_size=4, small_epochs=1.5))
    assert seen == [(4, 4)] * 6 + [(8, 8)] * 6


def test_every_epoch_sees_every_image_once_in_another_order():
    images = np.arange(64, dtype=np.float32)[:, None, None, None] * np.ones(
        (1, 1, 8, 8), np.float32
    )
    data = dc.replace(SPLITS, train=ArraySet(images, np.zeros(64, np.int64)))
    job = loop.Loop(
        digits_net(), data, dc.replace(TINY, augment="none"), {}, None, torch.device("cpu")
    )
    epochs = [
        [int(v) for step in range(4) for v in job.batches.at(4 * epoch + step)[0][:, 0, 0, 0]]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64)) and epochs[0] != epochs[1]


def test_the_precision_used_is_reported(monkeypatch):
    asked = dc.replace(TINY, precision="bf16", epochs=0.25)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert finetune(digits_net(), SPLITS, asked).precision == "float32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    if not torch.cuda.is_available():
        trained = finetune(digits_net(), SPLITS, asked)
        assert trained.precision == "bf16" and trained.device == "cpu"
        assert all(p.dtype == torch.float32 for p in trained.module.parameters())


@given(peak=st.floats(1e-6, 10), warmup=st.floats(0, 0.99), num_steps=st.integers(1, 500))
def test_the_schedule_rises_to_its_peak_and_falls_to_nothing(peak, warmup, num_steps):
    spec = dc.replace(TINY, learning_rate=peak, warmup=warmup)
    rates = [learning_rate(spec, step, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    rising = sum((step + 1) / (num_steps + 1) < warmup for step in range(num_steps))
    assert abs(top - rising) <= 1
    if num_steps > 100 and warmup < 0.8:
        assert rates[-1] < 0.01 * peak and max(rates) > 0.9 * peak


def shifts_of(image, flips):
    """Every image that a shift (edges of zeros) and, with `flips`, a mirroring can give."""
    pad = max(1, image.shape[2] // 8)
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    _, high, wide = image.shape
    for down in range(2 * pad + 1):
        for right in range(2 * pad + 1):
            crop = padded[:, down : down + high, right : right + wide]
            yield crop
            if flips:
                yield crop[:, :, ::-1]


@pytest.mark.parametrize("augment", ["crop", "flip_crop"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 17)])
def test_augmentation_is_a_shift_and_for_flip_crop_a_mirroring(augment, shape):
    pixels = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    found = augmented(pixels, augment, torch.Generator().manual_seed(1))
    assert found.shape == pixels.shape
    chosen = []
    for image, result in zip(pixels.numpy(), found.numpy(), strict=True):
        options = list(shifts_of(image, augment == "flip_crop"))
        matches = [n for n, option in enumerate(options) if np.array_equal(option, result)]
        assert len(matches) == 1, "exactly one shift and mirroring gives this image"
        chosen += matches
    assert len(set(chosen)) > 6, "and it varies"
    if augment == "flip_crop":
        assert 8 < sum(n % 2 for n in chosen) < 32


@pytest.mark.parametrize("augment", ["crop", "flip_crop"])
def test_augmentation_depends_on_its_generator_alone(augment):
    pixels = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first = augmented(pixels, augment, torch.Generator().manual_seed(1))
    assert torch.equal(first, augmented(pixels, augment, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augmented(pixels, augment, torch.Generator().manual_seed(2)))


def test_no_augmentation_is_the_input_itself():
    pixels = torch.randn(2, 1, 8, 8)
    assert augmented(pixels, "none", torch.Generator()) is pixels


@pytest.mark.parametrize("share", [0.1, 0.375, 0.9])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 31)])
def test_cutout_takes_one_square_from_each_image_its_centre_anywhere(share, shape):
    pixels = torch.rand(60, *shape, generator=torch.Generator().manual_seed(0)) + 1
    found = cut_out(pixels, share, torch.Generator().manual_seed(1))
    _, high, wide = shape
    tall, broad = round(share * high), round(share * wide)
    squares = [
        (
            max(y - tall // 2, 0),
            y - tall // 2 + tall,
            max(x - broad // 2, 0),
            x - broad // 2 + broad,
        )
        for y in range(high)
        for x in range(wide)
    ]
    chosen = []
    for image, result in zip(pixels, found, strict=True):
        options = []
        for top, bottom, left, right in set(squares):
            option = image.clone()
            option[:, top:bottom, left:right] = 0
            if torch.equal(option, result):
                options.append((top, left))
        assert options, "one of the squares gives this image"
        chosen += options[:1]
    assert len(set(chosen)) > 15, "and it varies"


def test_of_several_processes_each_cuts_out_what_one_would():
    pixels = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = cut_out(pixels, 0.5, torch.Generator().manual_seed(3))
    for part in (slice(0, 5), slice(5, 12)):
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(cut_out(pixels[part], 0.5, generator, part, 12), whole[part])


def test_training_accuracy_counts_right_answers():
    module = digits_net()
    inputs = torch.from_numpy(next(SPLITS.batches(SPLITS.train, 1000)))
    with torch.no_grad():
        expected = (module(inputs).argmax(1).numpy() == SPLITS.train.labels).mean()
    assert training_accuracy(module, SPLITS, SPLITS.train, batch_size=7) == pytest.approx(
        expected, abs=1 / 64
    )


def test_the_moving_average_follows_its_formula():
    from tersor.methods.steps import moving_average

    update = moving_average(0.9)
    averaged, values, count = (
        [torch.zeros(3)],
        [torch.ones(3), 2 * torch.ones(3)],
        [torch.zeros(1).long()],
    )
    update(averaged, [values[0]], torch.tensor(1))
    expected = torch.ones(3) * (1 - 2 / 11)
    assert torch.allclose(averaged[0], expected)
    update(averaged, [values[1]], torch.tensor(1000))
    assert torch.allclose(averaged[0], expected + (2 - expected) * (1 - 0.9))
    update(count, [torch.tensor([7])], torch.tensor(3))
    assert count[0].item() == 7


def test_a_short_run_is_judged_by_what_it_learned():
    data = load_data("digits")
    spec = Finetune(
        epochs=3, batch_size=64, augment="none", precision="float32", compile="off", ema_decay=0.99
    )
    trained = finetune(load_model("digits_net"), data, spec)
    assert training_accuracy(trained.module, data, data.validation) > 0.8
