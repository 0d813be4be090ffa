"""Pruned, then trained for the same time: test accuracy, paired with the float network, of this and of Torch-Pruning.

    python benchmarks/pruning_finetuned.py --data folder:DIR --model resnet18 --weights FILE --work DIR \\
        --out rows.json --forms channel/fisher/auto/0.25 torch_pruning/taylor/global/0.25 --epochs 3

A form is STRUCTURE/CRITERION/SCOPE/TARGET. TARGET is the share of the weights that go for structures that are masked,
else the share of the multiplications (macs) that may stay. A fifth part "fit" fits what stays to the outputs of the
original before training. Structure low_rank makes layers thinner in series: CRITERION is its method, SCOPE size or
macs. Structure torch_pruning stands for the tool of that name: channels, by its importance CRITERION (magnitude,
taylor), in scope layer, global or isomorphic. blocks/NAME+NAME are the residual branches that go, and
widths/CRITERION/NAME=CHANNELS+.../fit the channels that stay, by their layers' names or the beginning of these.
--start is a network of --work or a .tersor file, which is pruned further, or with the form "as_it_is" trained on.
--teachers are .tersor files whose answers together, on an engine, are learnt from in place of the float network's.
All forms are trained by one loop with one recipe; with --epochs 0 they are judged after batch norm was re-estimated.
Networks go to --work, from where pruning_speed.py takes them. Rows are appended to --out; those that are there stay,
and an interrupted training goes on from its checkpoint. `right` of a row has a bit for each test image, in
hexadecimal digits.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import pathlib
import re
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import tersor
from tersor.bench.environment import environment
from tersor.graph.branches import residual_blocks
from tersor.graph.coupling import coupled_groups
from tersor.graph.fold import fold_copies_
from tersor.methods import prune_structured as structured
from tersor.methods.prune import Evidence, prune
from tersor.methods.prune_family import ChannelFamily
from tersor.specs.prune import MASKED

RANKED_ON = 128  # images, where the channels that stay are numbered
LONGEST = 190  # characters of a form in a file's name
SLACK = 1.03  # of its target that the other tool may pass
CLASSIFIERS = {"resnet18": "fc", "vgg16_bn": "classifier.6"}


def main():
    options = parsed()
    torch.set_num_threads(options.threads)
    splits = tersor.load_data(options.data, num_calibration=options.images)
    float_network = tersor.load_model(options.model, weights=options.weights)
    base, start = copy.deepcopy(float_network), ""
    if options.start:
        base, start = network_of(options, splits), pathlib.Path(options.start).stem
    if options.fold_copies:
        fold_copies_(base, torch.zeros(2, *splits.input_shape))
    inputs = list(splits.batches(splits.calibration, 64))
    out, work = pathlib.Path(options.out), pathlib.Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    told = json.loads(out.read_text()) if out.exists() else {"rows": []}
    original = score_of(float_network, splits, options)
    size, all_params = macs_of(float_network, splits), params_of(float_network)
    print(f"{options.model} float: {original.accuracy:.2%}", flush=True)
    for form in options.forms:
        key = {
            "model": options.model,
            "form": form,
            "epochs": options.epochs,
            "seed": options.seed,
            "num_samples": len(original.per_sample),
        }
        if start:
            key["start"] = start
        if any(all(row[k] == v for k, v in key.items()) for row in told["rows"]):
            continue
        started = time.perf_counter()
        changed, masks = changed_by(form, base, splits, inputs, options)
        row = key | {"seconds_to_prune": round(time.perf_counter() - started, 1)}
        name = file_name(start or options.model, form, options)
        checkpoint = work / f"{name}.checkpoint"
        network = tersor.reestimate_batch_norm(changed, inputs)
        if options.epochs:
            recipe = recipe_of(options)
            trained = tersor.finetune(
                network,
                splits,
                recipe,
                masks=masks,
                teacher=teacher_of(float_network, splits, options)
                if recipe.needs_teacher
                else None,
                checkpoint=checkpoint,
                on_progress=tell,
            )
            network = trained.module
            if options.teachers:
                row["teachers"] = [pathlib.Path(file).name for file in options.teachers]
            row |= {"recipe": recipe.to_dict(), "seconds_to_train": round(trained.seconds)}
        torch.save(network, work / f"{name}.pt")
        score = score_of(network, splits, options)
        weights = [p for p in network.parameters() if p.ndim > 1]
        interval = tersor.paired_interval(score, original).to_dict()
        row |= {
            "accuracy": score.accuracy,
            "float_accuracy": original.accuracy,
            "interval": interval,
            "macs": macs_of(network, splits) / size,
            "params": params_of(network) / all_params,
            "zeros": 1
            - sum(int((p != 0).sum()) for p in weights) / sum(p.numel() for p in weights),
            "right": np.packbits(np.asarray(score.per_sample) > 0).tobytes().hex(),
            "engine": options.engine,
            "threads": options.threads,
            "data": splits.name,
            "num_images": options.images,
        }
        told = json.loads(out.read_text()) if out.exists() else {"rows": []}
        told["rows"].append(row)
        told["environment"] = environment()
        out.write_text(json.dumps(told, indent=1) + "\n")
        checkpoint.unlink(missing_ok=True)
        print(
            f"{form:36} {options.epochs:g} epochs {row['accuracy']:.2%}  {interval['difference_pt']:+.2f} "
            f"({interval['low_pt']:+.2f} to {interval['high_pt']:+.2f})  macs {row['macs']:.4f} params "
            f"{row['params']:.4f} zeros {row['zeros']:.4f}",
            flush=True,
        )


def network_of(options, splits):
    """The network of --start."""
    if not options.start.endswith(".tersor"):
        return torch.load(options.start, weights_only=False)  # written by us
    inputs = splits.batches(splits.calibration, 64)
    fresh = tersor.load_model(options.model, weights=options.weights)
    return tersor.load(options.start, into=fresh, inputs=inputs)


def file_name(base, form, options):
    """Of a network, without its ending; file systems refuse names of more than 255 characters."""
    said = form.replace("/", "-")
    if len(said) > LONGEST:
        said = f"{said[:LONGEST]}~{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    return f"{base}-{said}-{options.epochs:g}-{options.seed}"


def tell(progress):
    if progress.step % 50 == 0:
        print(progress, flush=True)


def recipe_of(options):
    return tersor.Finetune(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        distill=options.distill,
        temperature=4.0,
        ema_decay=options.ema_decay,
        label_smoothing=0.0,
        warmup=0.1,
        compile="off",
        seed=options.seed,
    )


def teacher_of(float_network, splits, options):
    """The float network, or the files on an engine; those with fewer or more outputs are made to fit it."""
    if not options.teachers:
        return float_network
    with torch.no_grad():
        outputs = float_network.eval()(torch.zeros(1, *splits.input_shape)).shape[1]
    return tersor.EngineTeacher([Answers(file, outputs, options) for file in options.teachers])


class Answers:
    """A session of a file whose logits are cut to `outputs`, or filled up with classes that are never meant."""

    engine, never = "openvino", -60.0

    def __init__(self, file, outputs, options):
        self.threads, self.outputs = options.threads, outputs
        self.session = tersor.open_session(
            tersor.load(file), engine=self.engine, threads=options.threads
        )

    def run(self, batch):
        logits = self.session.run(batch)[:, : self.outputs]
        missing = self.outputs - logits.shape[1]
        return np.pad(logits, ((0, 0), (0, missing)), constant_values=self.never)


def changed_by(form, module, splits, inputs, options):
    """The pruned network and its masks (None where parts went)."""
    if form == "as_it_is":
        return module, None
    if form.startswith(("blocks/", "widths/")):
        return by_name(form, module, splits, inputs, options), None
    structure, criterion, scope, target, *fit = form.split("/")
    example = torch.zeros(1, *splits.input_shape)
    if structure == "torch_pruning":
        return by_torch_pruning(module, splits, criterion, scope, target, options), None
    named = {"criterion": criterion, "scope": scope, "reconstruct": fit == ["fit"]}
    if structure in MASKED:
        spec = tersor.Prune(structure=structure, sparsity=float(target), **named)
        pruned = prune(module, spec, evidence=Evidence(inputs), seed=options.seed)
        return pruned.module, pruned.masks
    if structure == "low_rank":
        spec = tersor.Factorize(method=criterion, **{scope: float(target)})
        return tersor.factorize(module, spec, inputs).module, None
    named |= {"floor": options.floor, "multiple_of": options.multiple_of, "structure": structure}
    spec = tersor.Prune(macs=float(target), **named)
    plan = structured.plan(module, spec, example, inputs=inputs, seed=options.seed)
    return structured.apply(module, plan, inputs=inputs, seed=options.seed), None


def by_name(form, module, splits, inputs, options):
    """What is named goes: whole residual branches, or all but so many channels of each group."""
    kind, *parts = form.split("/")
    example = torch.zeros(1, *splits.input_shape)
    if kind == "blocks":
        blocks, gone = residual_blocks(module, example), parts[0].split("+")
        stay = tuple(f"re:{re.escape(block)}[.].*" for block in blocks if block not in gone)
        share = len(gone) / len(blocks)
        plan = structured.plan(
            module,
            tersor.Prune(structure="block", sparsity=share, exclude=stay),
            example,
            inputs=inputs,
        )
        return structured.apply(module, plan, inputs=inputs, seed=options.seed)
    criterion, named = parts[0], dict(part.split("=") for part in parts[1].split("+"))
    images = np.concatenate(inputs)[:RANKED_ON]
    untried = {group.name: ([1], [0.0]) for group in coupled_groups(module, example).groups}
    family = ChannelFamily(
        module, images, example, criterion=criterion, harms=untried, seed=options.seed
    )
    gone = {}
    for group in family.ranked.groups:
        begun = (k for k in named if group.name.startswith(k))
        stay = int(named.get(group.name) or named.get(next(begun, ""), group.num_units))
        gone[group.name] = np.sort(family.ranked.ranks[group.name][: group.num_units - stay])
    return structured.apply(module, family.plan(gone), inputs=inputs, seed=options.seed)


def largest(attempt, allowed, rounds=8):
    """The network of the largest share in (0, 1) that is allowed, by bisection."""
    low, high, best = 0.0, 1.0, None
    for _ in range(rounds):
        middle = (low + high) / 2
        network = attempt(middle)
        if allowed(network):
            low, best = middle, network
        else:
            high = middle
    if best is None:
        raise SystemExit("no share of the network is within the target")
    return best


def by_torch_pruning(module, splits, criterion, scope, target, options):
    """Channels removed by Torch-Pruning until the target is met; labelled training images for taylor."""
    import torch_pruning as tp

    kinds = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }
    example = torch.zeros(1, *splits.input_shape)
    gradients = gradients_of(module, splits, options.images) if criterion == "taylor" else {}

    def attempt(kept):
        network = copy.deepcopy(module)
        for name, parameter in network.named_parameters():
            parameter.grad = gradients.get(name)
        pruner = tp.pruner.BasePruner(
            network,
            example,
            importance=kinds[criterion](),
            global_pruning=scope != "layer",
            isomorphic=scope == "isomorphic",
            pruning_ratio=1 - kept,
            max_pruning_ratio=1 - options.floor,
            ignored_layers=[network.get_submodule(CLASSIFIERS[options.model])],
            round_to=options.multiple_of,
        )
        pruner.step()
        network.zero_grad(set_to_none=True)
        return network

    # Its rounding of halves lies a little above a quarter of the multiplications: it is given that.
    most = float(target) * macs_of(module, splits) * SLACK
    return largest(attempt, lambda network: macs_of(network, splits) <= most)


def gradients_of(module, splits, count):
    """The gradient of the mean loss over `count` labelled training images, by the name of the parameter."""
    network, part = copy.deepcopy(module).eval(), splits.train
    starts = range(0, count, 64)
    for start, batch in zip(starts, splits.batches(part, 64), strict=False):
        labels = torch.from_numpy(part.labels[start : start + len(batch)])
        functional.cross_entropy(network(torch.from_numpy(batch)), labels).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def score_of(module, splits, options):
    session = tersor.open_session(module, engine=options.engine, threads=options.threads)
    return tersor.evaluate(session, splits)


def params_of(module):
    return sum(p.numel() for p in module.parameters())


def macs_of(module, splits):
    """Multiplications of convolutions and linear layers for one image."""
    total = 0

    def count(layer, _, output):
        nonlocal total
        total += layer.weight.numel() * output[0].numel() // output.shape[1]

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        module.eval()(torch.zeros(1, *splits.input_shape))
    for handle in handles:
        handle.remove()
    return total


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18", choices=list(CLASSIFIERS))
    parser.add_argument("--weights", required=True)
    parser.add_argument("--start", help="a network to prune instead")
    parser.add_argument("--forms", nargs="+", required=True)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--distill", type=float, default=0.9)
    parser.add_argument("--teachers", nargs="+", help=".tersor files to learn from")
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=1024, help="images that pruning looks at")
    parser.add_argument(
        "--floor", type=float, default=0.1, help="least share of a layer's channels"
    )
    parser.add_argument("--multiple-of", type=int, default=16, help="channels kept, rounded")
    parser.add_argument("--fold-copies", action="store_true", help="fold equal copies first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engine", default="torch_bf16", choices=["torch", "torch_bf16"])
    parser.add_argument("--work", required=True, help="folder for networks and checkpoints")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
