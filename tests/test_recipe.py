"""A recipe does its steps in order; the file goes back into the user's class with all of them."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.artifact import pack
from tersor.cli import main
from tersor.errors import SpecError
from tersor.methods.restore import plans_of, restore
from tersor.recipe import read_recipe, run_recipe
from tersor.runs import Run
from tersor.specs import Factorize, Finetune, Prune, Quantize, Recipe, Share

TRAIN = Finetune(epochs=1, batch_size=64, augment="crop", compile="off", distill=1.0)
EVERYTHING = Recipe(
    (
        Prune(structure="channel", sparsity=0.3),
        Factorize(method="svd", size=0.7, exclude=("features.0",)),
        TRAIN,
        Prune(sparsity=0.5, scope="global"),
        TRAIN,
        Quantize(bits=6, num_calibration=64),
    )
)


@pytest.fixture(scope="module")
def splits():
    torch.set_num_threads(1)  # sums in one order: equal recipes are equal bit for bit
    return tersor.load_data("digits")


@pytest.fixture(scope="module")
def net(splits):
    recipe = Finetune(epochs=12, batch_size=64, augment="crop", compile="off")
    return tersor.finetune(tersor.load_model("digits_net"), splits, recipe).module


@pytest.fixture(scope="module")
def made(net, splits):
    return run_recipe(net, splits, EVERYTHING)


def test_everything_combines_and_keeps_the_accuracy(net, splits, made):
    score, original = (
        tersor.evaluate(tersor.open_session(graph, threads=1), splits)
        for graph in (made.graph, tersor.export_onnx(net, splits.input_shape))
    )
    assert score.accuracy > original.accuracy - 0.05
    count = [sum(p.numel() for p in m.parameters()) for m in (made.module, net)]
    assert count[0] < 0.5 * count[1]
    weights = [p for n, p in made.module.named_parameters() if p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert zeros == pytest.approx(0.5, abs=0.01)  # training kept them


def test_the_file_goes_back_with_all_its_steps_and_trains_on(splits, made):
    held = pack(made.graph, plan=made.plan.to_dict())
    assert [p.request.kind for p in plans_of(held)] == ["prune", "factorize", "prune", "quantize"]
    calibration = list(splits.batches(splits.calibration, 64))
    again = restore(held, tersor.load_model("digits_net"), inputs=calibration)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in made.module.state_dict().items()
    }
    agreement = [
        tersor.open_session(m, engine="torch", threads=1).run(calibration[0]).argmax(1)
        for m in (again, made.module)
    ]
    assert (agreement[0] == agreement[1]).mean() > 0.9
    trained = tersor.finetune(again, splits, TRAIN, teacher=made.module).module
    assert tersor.evaluate(tersor.open_session(trained, engine="torch"), splits).accuracy > 0.9


def test_shared_filters_and_training_alone(net, splits):
    found = run_recipe(net, splits, Recipe((Share(), TRAIN)))
    assert found.plan.request == Share() and found.plan.earlier == ()
    assert run_recipe(net, splits, Recipe((TRAIN,))).plan is None


def test_the_given_network_is_left_alone(net, splits):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    run_recipe(net, splits, Recipe((Prune(sparsity=0.9), Quantize(num_calibration=64))))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((), "no steps"),
        ((Quantize(), TRAIN), "quantize last"),
        ((Prune(), Prune(structure="channel")), "put it before"),
        ((Prune(), Factorize()), "put it before"),
        ((Prune(), Share()), "put it before"),
        ((Prune(), Quantize(mode="qat")), "mode qat trains all weights"),
        ((Recipe((TRAIN,)),), "step 1 is a recipe"),
    ],
)
def test_an_order_that_cannot_be_is_refused_before_any_work(splits, steps, words):
    with pytest.raises(SpecError, match=words):
        run_recipe(nn.Identity(), splits, Recipe(steps))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "one object"),
        ('{"steps": [{"kind": "prun"}]}', "did you mean 'prune'"),
        ('{"steps": [{"kind": "prune", "sparsty": 1}]}', "did you mean 'sparsity'"),
        ('{"kind": "prune"}', "expected a recipe"),
        ('{"seed": 1}', "'steps' is missing"),
    ],
)
def test_a_recipe_file_that_means_nothing_is_refused(tmp_path, text, words):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(SpecError, match=f"(?i){words}"):
        read_recipe(tmp_path / "recipe.json")


def test_the_command_tells_every_step_and_leaves_only_the_file(tmp_path, capsys):
    steps = [step.to_dict() for step in EVERYTHING.steps if step.kind != "factorize"]
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": steps}))
    out = tmp_path / "net.tersor"
    code = main(
        ["compress", "digits_net", "--data", "digits", "--recipe", str(tmp_path / "recipe.json"),
         "--out", str(out), "--json"]
    )  # fmt: skip
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert code == 0 and told["size_bytes"] == out.stat().st_size
    for kind in ("coverage: prune", "coverage: quantize"):
        assert kind in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.tersor", "recipe.json"]
    logits = tersor.open_session(tersor.load(out), threads=1).run(
        np.zeros((1, 1, 8, 8), np.float32)
    )
    assert np.isfinite(logits).all()


class Killed(BaseException):
    pass


def test_a_killed_recipe_goes_on_from_its_steps_to_the_same_bytes(
    net, splits, made, tmp_path, monkeypatch
):
    """Killed inside each training, once, and before the quantization."""
    import tersor.recipe as recipes

    torch.set_num_threads(1)  # a session may have changed it
    changes, real = [], recipes._changed
    monkeypatch.setattr(
        recipes, "_changed", lambda *given: changes.append(given[2].kind) or real(*given)
    )

    def run(stop_in=None):
        def told(named, progress):
            if named == stop_in and progress.epoch >= 0.5:
                raise Killed

        with Run(tmp_path) as held:
            held.begin(recipe=EVERYTHING.to_dict())
            return run_recipe(net, splits, EVERYTHING, run=held, on_progress=told)

    for step in ("step 3, finetune", "step 5, finetune"):
        with pytest.raises(Killed):
            run(step)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(recipes, "quantize_network", lambda *_, **__: exec("raise Killed", globals()))
        run()
    again = run()
    assert changes == ["prune", "factorize", "prune"], "each was made once"
    assert again.plan == made.plan
    assert again.graph.SerializeToString() == made.graph.SerializeToString()
    assert all(
        torch.equal(value, again.module.state_dict()[key])
        for key, value in made.module.state_dict().items()
    )


def test_the_command_keeps_its_steps_until_the_file_is_there_and_refuses_another_recipe(
    tmp_path, monkeypatch, capsys
):
    import tersor.recipe as recipes

    def write(*steps):
        (tmp_path / "recipe.json").write_text(json.dumps(Recipe(steps).to_dict()))

    command = ["compress", "digits_net", "--data", "digits", "--out", str(tmp_path / "net.tersor")]
    command += ["--recipe", str(tmp_path / "recipe.json")]
    write(Prune(sparsity=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "deployment_graph", lambda *_: exec("raise KeyboardInterrupt"))
        assert main(command) == 130
    assert (tmp_path / "net.tersor.steps" / "rows.jsonl").exists()
    write(Prune(sparsity=0.6))
    assert main(command) == 1
    assert "recipe.steps=" in capsys.readouterr().err
    write(Prune(sparsity=0.5))
    with Run(tmp_path / "net.tersor.steps"):
        assert main(command) == 1
    assert f"net.tersor.steps is in use by process {os.getpid()}" in capsys.readouterr().err
    assert main(command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.tersor", "recipe.json"]
