"""Pickles are read without running code, or not at all; --trust is asked for by name."""

import json
import pathlib
import pickle

import pytest
import torch

from tersor.cli import main
from tersor.errors import ModelError
from tersor.models import load_model
from tersor.models.load import read_weights


class Planted:
    """Its pickle writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def hostile(directory):
    """A file of weights that would leave `ran` behind, and that path."""
    ran = directory / "ran"
    state = load_model("digits_net").state_dict()
    file = directory / "net.pt"
    torch.save({"state_dict": state, "note": Planted(ran)}, file)
    return file, ran


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    file, ran = hostile(tmp_path)
    with pytest.raises(ModelError, match="--trust"):
        read_weights(file)
    assert main(["inspect", "digits_net", "--weights", str(file)]) == 1
    assert "--trust" in capsys.readouterr().err and not ran.exists()


@pytest.mark.parametrize("joined", [False, True])
def test_trust_reads_it_all_the_same(tmp_path, capsys, joined):
    file, ran = hostile(tmp_path)
    given = [f"--weights={file}"] if joined else ["--weights", str(file)]
    assert main(["inspect", "digits_net", *given, "--trust", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] and ran.exists()


def test_a_whole_module_is_its_state(tmp_path):
    net = load_model("digits_net", seed=3)
    torch.save(net, tmp_path / "whole.pt")
    with pytest.raises(ModelError, match="--trust"):
        read_weights(tmp_path / "whole.pt")
    found = read_weights(tmp_path / "whole.pt", trust=True)
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())


def test_trust_without_a_pickle_is_told(tmp_path, capsys):
    assert main(["inspect", "digits_net", "--trust"]) == 2
    assert "leave it out" in capsys.readouterr().err
    (tmp_path / "other.pkl").write_bytes(pickle.dumps([1, 2]))
    code = main(["inspect", "digits_net", "--weights", str(tmp_path / "other.pkl"), "--trust"])
    assert code == 1 and "tersor: " in capsys.readouterr().err
