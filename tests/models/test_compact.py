"""The compact form is rounded once, read back exactly, and refuses damaged files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ModelError
from tersor.models import load_model, read_weights, save_compact
from tersor.models.compact import compact_tensors, expand_tensors, packed, unpacked


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.floats(1e-5, 0.05), st.integers(0, 1000))
def test_rounding_once_is_a_fixed_point_with_the_error_asked_for(rows, columns, error, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    tensors = compact_tensors({"w": weight}, {"w": error})
    rounded = expand_tensors(tensors)["w"]
    step = tensors["w.step"][:, None]
    assert torch.all((rounded - weight).abs() <= step * 0.5001)
    assert torch.equal(torch.floor(rounded / step).to(tensors["w.codes"].dtype), tensors["w.codes"])
    assert torch.all(rounded != 0)


def test_mean_error_is_the_one_asked_for():
    weight = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(0))
    for error in (0.001, 0.01):
        rounded = expand_tensors(compact_tensors({"w": weight}, {"w": error}))["w"]
        assert float((rounded - weight).square().mean() / weight.var()) == pytest.approx(
            error, rel=0.05
        )


def test_a_file_gives_the_same_weights_again_and_is_small(tmp_path):
    module = load_model("digits_net", seed=1)
    path = tmp_path / "net.safetensors.xz"
    size = save_compact(module, path, error=0.001, linear_error=0.01)
    first = read_weights(path)
    rounded = load_model("digits_net", weights=path)
    save_compact(rounded, tmp_path / "again.safetensors.xz", error=0.001, linear_error=0.01)
    assert size == path.stat().st_size < 0.25 * sum(4 * p.numel() for p in module.parameters())
    for key, value in rounded.state_dict().items():
        assert torch.equal(value, first[key].to(value.dtype))


def test_damaged_files_are_refused(tmp_path):
    data = packed(compact_tensors({"w": torch.randn(3, 4)}, {"w": 0.01}))
    for broken in (data[:-5], data + b"x", b"no", data[:20] + b"\0" + data[21:]):
        with pytest.raises(ModelError):
            unpacked(broken)
    with pytest.raises(ModelError, match=r"larger than 2 GiB|truncated"):
        unpacked(data, limit=10)
    with pytest.raises(ModelError, match="codes without one step"):
        expand_tensors({"w.codes": torch.zeros(3, 4, dtype=torch.int8)})
    path = tmp_path / "x.safetensors.xz"
    path.write_bytes(data[:-5])
    with pytest.raises(ModelError, match=r"truncated|damaged"):
        read_weights(path)
