"""The benchmarks run: each scenario for one small round, and the plot is drawn.

No speed is asserted here. Contenders that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import dbpool_executor

PACKAGE = Path(dbpool_executor.__file__).parent.parent
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
OURS = "dbpool_executor"
STANDARD = "ProcessPoolExecutor"
SCENARIOS = [
    "trivial-rate",
    "trivial-bursts",
    "trivial-batches",
    "trivial-round-trip",
    "read-rate",
    "read-round-trip",
    "update-rate",
    "insert-chunks",
    "bytes-1mb",
    "rows-100k",
    "numpy-8mb",
    "first-result",
    "idle",
    "workers-1-to-64",
    "mixed-load",
    "job-length",
]
LONGEST = 600.0  # seconds, on a machine with much else to do
EVERYONE = {"update-rate", "trivial-batches"}  # scenarios that all contenders run here


@pytest.fixture
def benchmark(postgresql_url):
    """Runs a program of the benchmarks and gives what it prints."""

    def run(program, *args):
        done = subprocess.run(
            [sys.executable, BENCHMARKS / program, *args],
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
            env={
                **os.environ,
                "PYTHONPATH": str(PACKAGE),
                "DBPOOL_BENCH_URL": postgresql_url.render_as_string(
                    hide_password=False
                ),
            },
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_every_scenario_is_here(benchmark):
    """The list above is what the program knows."""
    assert "{" + ",".join(SCENARIOS) + "}" in "".join(
        benchmark("run.py", "--help").split()
    )


@pytest.mark.heavy
@pytest.mark.timeout(LONGEST + 20)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_runs_for_a_round(benchmark, scenario, tmp_path):
    """Results are right, ours and a peer have samples, and the run says where it was."""
    if scenario == "numpy-8mb" and importlib.util.find_spec("numpy") is None:
        pytest.skip("numpy is not installed")
    contenders = [f"--contender={name}" for name in (OURS, STANDARD)]
    if scenario in EVERYONE:
        contenders = []
    out = tmp_path / "run.json"
    options = [f"--scenario={scenario}", *contenders, "--quick", f"--out={out}"]
    tables = benchmark("run.py", *options)
    assert f"\n{scenario}\n" in tables
    assert f"    {OURS} " in tables
    run = json.loads(out.read_text())
    assert run["machine"]["Python"]
    assert run["versions"]["sqlalchemy"]
    assert run["failures"] == []
    for by_name in run["samples"][scenario].values():
        assert all(len(values) == 1 for values in by_name.values())
        assert OURS in by_name
    assert any(len(by_name) > 1 for by_name in run["samples"][scenario].values())


def test_the_plot_is_well_formed(benchmark, tmp_path):
    """Each contender has a curve and a name."""
    rates = {"dbpool_executor": [100.0, 110.0], "a <peer>": [300.0, 310.0]}
    lengths = {f"us a job of {length} ms": rates for length in ("0.1", "1", "100")}
    run = {"workers": 2, "samples": {"job-length": lengths}}
    source, target = tmp_path / "run.json", tmp_path / "plot.svg"
    source.write_text(json.dumps(run))
    benchmark("plot.py", source, target)
    svg = ET.parse(target).getroot()
    curves = svg.findall("{http://www.w3.org/2000/svg}polyline")
    texts = {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert len(curves) == len(rates)
    assert texts >= set(rates)
