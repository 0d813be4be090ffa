"""Energy counted by the published prices, and read from counters that start again at their end."""

import pytest

from tersor.bench.energy import counted_energy_mj, counted_parts_mj, measured_energy


def test_counted_energy_is_the_published_price_of_each_operation():
    # Horowitz 2014: 3.7 + 0.9 pJ a float product and sum, 0.2 + 0.1 pJ in 8 bits, 1.3 nJ for 8 bytes of DRAM.
    assert counted_energy_mj(1e9, 0, integers=False) == pytest.approx(4.6)
    assert counted_energy_mj(1e9, 0, integers=True) == pytest.approx(0.3)
    assert counted_parts_mj(0, 8e6, integers=True) == (0, pytest.approx(1.3))
    assert counted_parts_mj(0, 8e6, integers=True, batch=4) == (0, pytest.approx(1.3 / 4))


@pytest.fixture
def counter(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package: counted in it already
    (zone / "max_energy_range_uj").write_text("1000000\n")
    return zone / "energy_uj"


def test_a_counter_is_read_around_the_runs(counter):
    counter.write_text("500\n")
    runs = []

    def run():
        runs.append(1)
        counter.write_text(f"{500 + 6000 * len(runs)}\n")

    found = measured_energy(run, 2, seconds=0.01, root=counter.parent.parent)
    assert found.mj == pytest.approx(3.0) and found.reason == ""  # 6000 uJ a run of 2 inputs


def test_a_counter_that_starts_again_is_followed(counter):
    counter.write_text("999000\n")
    found = measured_energy(
        lambda: counter.write_text("1000\n"), 1, seconds=0, root=counter.parent.parent
    )
    assert found.mj == pytest.approx(2.0)


def test_what_cannot_be_measured_is_said(counter, tmp_path):
    root = counter.parent.parent
    assert "no energy counters" in measured_energy(int, 1, root=tmp_path / "none").reason
    counter.write_text("500\n")
    still = measured_energy(int, 1, seconds=0, root=root)
    assert still.mj is None and "stand still" in still.reason
    counter.write_text("what?\n")
    assert "cannot be read" in measured_energy(int, 1, seconds=0, root=root).reason


def test_counters_of_root_alone_are_told(counter, monkeypatch):
    def refused(path):
        raise PermissionError

    monkeypatch.setattr("tersor.bench.energy._microjoules", refused)
    assert "root may" in measured_energy(int, 1, root=counter.parent.parent).reason
