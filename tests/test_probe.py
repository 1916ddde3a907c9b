"""``doctor --probe`` measures the machine, and the cost model then reads what was measured. Nothing else measures."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest
import torch

from hwbp_compiler import doctor
from hwbp_compiler.cost import devices, probe
from hwbp_compiler.cost.devices import device_figures, kernel_figures
from hwbp_compiler.cost.probe import Probe, digest, keep, path, stored
from hwbp_compiler.joint_pass import HighwayPass
from hwbp_compiler.measure_device import measured
from hwbp_compiler.options import Options

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LIKE = devices._FITTED_ON


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    probe._read.cache_clear()
    yield
    probe._read.cache_clear()


def test_without_a_probe_the_table_counts():
    assert stored(CPU) is None and digest() == ""
    assert device_figures(CPU) == devices._of_the_table(CPU)
    assert "table" in doctor._cost_model()[0]


def test_what_was_measured_is_kept_and_read_again():
    found = Probe(1e9, 2e9, 3e-6, 4e-7, 5e-6)
    assert keep(CPU, found) == path(CPU) and stored(CPU) == found
    assert "1 GF/s, 2.0 GB/s, 3.0 us a launch" in doctor._cost_model()[0]


def test_on_the_machine_that_the_table_was_fitted_on_a_probe_changes_nothing():
    before = device_figures(CPU), kernel_figures("gru", torch.empty(1))
    keep(CPU, LIKE)
    after = device_figures(CPU), kernel_figures("gru", torch.empty(1))
    for a, b in zip(before, after, strict=True):
        assert asdict(a) == pytest.approx(asdict(b))


@pytest.mark.parametrize("figure", [field.name for field in fields(Probe)])
def test_a_machine_that_is_twice_as_fast_in_one_thing_has_that_figure_doubled(figure):
    before = device_figures(CPU)
    keep(CPU, replace(LIKE, **{figure: 2 * getattr(LIKE, figure)}))
    after = device_figures(CPU)
    assert getattr(after, figure) == pytest.approx(2 * getattr(before, figure))
    assert replace(after, **{figure: getattr(before, figure)}) == pytest.approx(before)


def test_a_gpu_has_the_figures_that_were_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = Probe(3e13, 2e12, 5e-6, 1e-6, 7e-6)
    keep(GPU, found)
    figures = device_figures(GPU)
    assert (figures.flops, figures.bytes, figures.launch, figures.piece, figures.step) == tuple(asdict(found).values())


def test_where_there_is_no_gpu_the_table_counts_for_its_code(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stored(GPU) is None and device_figures(GPU) == devices._of_the_table(GPU)


def test_code_compiled_before_a_probe_is_not_taken_from_a_cache_after_it():
    before = HighwayPass(Options()).uuid()
    keep(CPU, LIKE)
    assert HighwayPass(Options()).uuid() != before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"flops": "fast"}', json.dumps(asdict(replace(LIKE, bytes=0.0)))])
def test_a_file_that_cannot_be_read_counts_as_none(text):
    path(CPU).parent.mkdir(parents=True)
    path(CPU).write_text(text)
    assert stored(CPU) is None and device_figures(CPU) == devices._of_the_table(CPU)


def test_the_doctor_measures_this_machine(capsys):
    assert doctor.main(measuring=True) in (0, 1)
    found = stored(CPU)
    assert found is not None and str(found) in capsys.readouterr().out
    # Far outside of what any machine does, but a wrong unit or a forgotten division is a factor of a thousand.
    assert 1e8 < found.flops < 1e13 and 1e8 < found.bytes < 1e13
    assert all(1e-8 < seconds < 1e-2 for seconds in (found.launch, found.piece, found.step))


def test_measuring_leaves_the_number_of_threads(monkeypatch):
    monkeypatch.setattr("hwbp_compiler.measure_device._seconds", lambda device, run: 1.0)
    before = torch.get_num_threads()
    measured(CPU)
    assert torch.get_num_threads() == before
