"""What each process of a training does: run by test_together.py, alone and under torchrun."""

import dataclasses as dc
import os
import pathlib
import signal
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tersor.data import ArraySet, split
from tersor.errors import TersorError
from tersor.methods import training as loop
from tersor.methods.finetune import finetune
from tersor.methods.qat import train_quantized
from tersor.methods.squeezing import squeeze
from tersor.models import load_model
from tersor.runs import Run, processes
from tersor.specs import Finetune, Squeeze

TINY = Finetune(epochs=2, learning_rate=0.05, batch_size=17, precision="float32", compile="off")


def make_splits(seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (76, 1, 8, 8), np.uint8)
    labels = generator.integers(0, 10, 76)
    train, test = ArraySet(images[8:], labels[8:]), ArraySet(images[:8], labels[:8])
    return split("noise", train, test, tuple("0123456789"), (0.5,), (0.25,))


class Random(nn.Module):
    """Batch norms of maps and of vectors, one without parameters, all kinds of dropout, stochastic depth."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm1d(20, momentum=None)])
        self.bare = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.hidden, self.last = nn.Linear(6 * 64, 20), nn.Linear(20, 10)
        self.never_used = nn.Linear(2, 2)

    def forward(self, images):
        maps = functional.dropout2d(self.norms[0](self.first(images)).relu(), 0.2, self.training)
        other = functional.dropout(self.second(maps), 0.3, self.training)
        if self.training:  # stochastic depth, by image
            other = other * torch.empty(len(other), 1, 1, 1).bernoulli_(0.7)
        vectors = self.hidden(self.bare(maps + other).flatten(1))
        vectors = functional.alpha_dropout(self.norms[1](vectors), 0.1, self.training)
        return self.last(vectors)


def random_net():
    torch.manual_seed(0)
    return Random().eval()


def digits_net(seed=3):
    return load_model("digits_net", seed=seed)


def small_net():
    torch.manual_seed(1)
    maps = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*maps, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10)).eval()


def masks(module):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(p.shape, generator=generator) < 0.5
        for name, p in module.named_parameters()
        if p.ndim > 1
    }


def plain():
    return finetune(random_net(), make_splits(), TINY)


def masked_with_hints():
    net = digits_net()
    spec = dc.replace(TINY, distill=0.3, hints=0.4, batch_size=16)
    return finetune(net, make_splits(), spec, masks=masks(net), teacher=digits_net(8))


def special_gradients():
    spec = dc.replace(TINY, slimming=1e-3, stripes=1e-3, epochs=1)
    return finetune(random_net(), make_splits(), spec)


def few_bits():
    spec = dc.replace(TINY, distill=1.0, epochs=1, learning_rate=0.01)
    options = {"weight_bits": 4, "activation_bits": 6, "num_calibration": 16}
    return train_quantized(digits_net(), make_splits(), training=spec, **options).trained


def coded():
    """Trained with the bits of the file: what steers the size sees the same weights in every process."""
    size = {"size": "3kB", "start": 2.0, "num_calibration": 16, "augment": "none"}
    spec = Squeeze(**size, epochs=1, learning_rate=0.01, batch_size=17, precision="float32")
    found = squeeze(small_net(), make_splits(), spec).trained
    assert found is not None
    return found


CASES = {f.__name__: f for f in (plain, masked_with_hints, special_gradients, few_bits, coded)}


def oracle(among):
    """Batch norm over the slices of a batch against torch's over the whole, float64: the largest differences."""
    from tersor.methods.together import Together

    generator = torch.Generator().manual_seed(0)
    worst = {}
    for shape in ((7, 3, 4, 5), (5, 3), (4, 3, 6)):
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 40
        aim = torch.randn(shape, generator=generator, dtype=torch.float64)
        together = Together(len(inputs), among)
        found = []
        for part, context in ((slice(None), None), (together.part, together.whole_batch())):
            norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
            layer = norm[len(shape)](3).double()
            with torch.no_grad():
                layer.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
            given = inputs[part].clone().requires_grad_()
            if context is None:
                output = layer(given)
            else:
                with context:
                    output = layer(given)
            (output * aim[part]).square().sum().backward()
            sums = [layer.weight.grad, layer.bias.grad]
            if context is not None:
                sums = [among.sum_(s) for s in sums]
            rows = [output.detach(), given.grad]
            if context is None:
                rows = [r[together.part] for r in rows]
            found.append([*rows, *sums, layer.running_mean, layer.running_var])
        worst[str(shape)] = max(
            float((ours - theirs).abs().max()) for theirs, ours in zip(*found, strict=True)
        )
    return worst


def directory_of_one(out, among):
    """A run under several processes: one owner; results, files and rows reach all."""
    calls = []

    def make(place):
        calls.append(1)
        (place / "file").write_text(f"by {among.rank}")
        return among.rank

    with Run(out / "run") as run:
        run.begin(seed=0)
        apart = run.step("apart", {}, make)
        content = (run.place("apart", {}) / "file").read_text()
        together = run.step("together", {}, make, together=True)
        again = run.step("together", {}, make, together=True)
        other = run.directory != out / "run"
    return [apart, content, together, again, len(calls), other, among.agreed(among.rank)]


def learned():
    """Every tensor that each case learned, by its name."""
    found = {}
    for name, case in CASES.items():
        trained = case()
        state = {f"module.{k}": v for k, v in trained.module.state_dict().items()}
        state |= {f"stripes.{k}": v for k, v in trained.stripes.items()}
        found[name] = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return found


def main(out):
    torch.set_num_threads(1)
    among, found = processes(), learned()
    facts = {"oracle": oracle(among), "run": directory_of_one(out, among), "refused": []}
    for call in (
        lambda: finetune(digits_net(seed=among.rank), make_splits(), TINY),
        lambda: finetune(digits_net(), make_splits(among.rank), TINY),
        lambda: finetune(digits_net(), make_splits(), dc.replace(TINY, epochs=1 + among.rank)),
        lambda: finetune(digits_net(), make_splits(), dc.replace(TINY, batch_size=2)),
    ):
        try:
            call()
        except TersorError as refused:
            facts["refused"].append(str(refused))
        else:
            facts["refused"].append("")
    torch.save({"states": found, **facts}, out / f"rank{among.rank}.pt")


def lost(out):
    """A training whose last process ends itself in the sixth step, after a checkpoint of each."""
    torch.set_num_threads(1)
    real = loop.Loop.step

    def step(self, number):
        if number == 5 and processes().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number)

    loop.Loop.step = step
    try:
        trained(out)
    except TersorError as refused:
        (out / f"lost{processes().rank}.txt").write_text(f"{type(refused).__name__}: {refused}")
        sys.exit(1)


def interrupted(out):
    """A training in which one process alone is told to stop, in the third step."""
    torch.set_num_threads(1)
    real = loop.Loop.step

    def step(self, number):
        if number == 2 and processes().rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(self, number)

    loop.Loop.step = step
    try:
        trained(out)
    except KeyboardInterrupt:
        (out / f"stopped{processes().rank}.txt").write_text("stopped")


def trained(out):
    return finetune(
        random_net(), make_splits(), TINY, checkpoint=out / "run.pt", checkpoint_seconds=0
    )


if __name__ == "__main__":
    {"main": main, "lost": lost, "interrupted": interrupted}[sys.argv[1]](pathlib.Path(sys.argv[2]))
