"The statistics of the record rule: bad input, oracles from scipy, and properties that must hold for every input."

import ast
import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from speedrun_lib import significance
from speedrun_lib.history import load_curve, load_records, load_samples
from speedrun_lib.significance import (
    EQUAL_LOSS,
    EQUAL_STEPS,
    best_of_rate,
    draw_exchange,
    draw_inflation,
    draw_matched,
    draw_power,
    draw_spread,
    draw_submissions,
    dropping_rate,
    loss_differences,
    loss_per_step,
    own_runs,
    p_below_target,
    pass_probability,
    peeking_rate,
    pooled_sd,
    rerun_table,
    runs_needed,
    sd_interval,
    simulate_submissions,
    t_statistics,
    welch,
)

margins = st.floats(0, 0.02)
spreads = st.floats(2e-4, 0.01)
counts = st.integers(2, 300)
levels = st.floats(1e-3, 0.2)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_module_imports_only_page_and_history():
    tree = ast.parse(Path(significance.__file__).read_text(encoding="utf-8"))
    inside = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    inside |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "speedrun_lib" in str(n.module)}
    assert inside == {"page", "history"}


@pytest.mark.parametrize(("losses", "says"), [
    ([], "two losses"), ([3.27], "two losses"), ([[3.27, 3.28], [3.27, 3.28]], "shape"), (3.27, "two losses"),
    ([3.27, math.nan, 3.28], "not finite"), ([3.27, math.inf], "diverged"), ([3.27] * 5, "more digits")])
def test_losses_that_cannot_be_judged(losses, says):
    with pytest.raises(ValueError, match=says) as error:
        p_below_target(losses)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [{"sd": 0}, {"sd": -1}, {"n": 1}, {"alpha": 0}, {"alpha": 1}, {"n": [5, 1]}])
def test_power_outside_its_range(bad):
    with pytest.raises(ValueError, match="need sd > 0, n >= 2 and 0 < alpha < 1"):
        pass_probability(**({"margin": 0.001, "sd": 0.001, "n": 10} | bad))


@pytest.mark.parametrize("bad", [{"margin": 0}, {"margin": -0.001}, {"margin": math.nan}, {"power": 1}, {"power": 0}])
def test_runs_needed_refuses_the_impossible(bad):
    with pytest.raises(ValueError, match="must be below the target"):
        runs_needed(**({"margin": 0.001, "sd": 0.001} | bad))


def test_other_bad_input():
    with pytest.raises(ValueError, match="two runs a side, got 1 and 3"):
        welch([1.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="only 1 validation in the last 100 steps"):
        loss_per_step(load_curve(81))


@given(st.lists(st.floats(3.2, 3.4), min_size=2, max_size=30), st.floats(3.25, 3.3))
def test_p_value_agrees_with_scipy(losses, target):
    if np.std(losses, ddof=1) < 1e-6:
        return  # rounding decides there, not statistics
    expected = stats.ttest_1samp(losses, target, alternative="less").pvalue
    assert p_below_target(losses, target) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_every_p_value_of_the_record_table():
    records = load_records()
    stored = records.p_below_target.dropna()
    assert len(stored) == 64
    for record_id, p in stored.items():  # two printed digits
        assert p_below_target(load_samples(record_id).final_val_loss) == pytest.approx(p, rel=0.05), record_id


@settings(max_examples=200)
@given(margins, margins, spreads, counts, levels)
def test_power_grows_with_the_margin(a, b, sd, n, alpha):
    low, high = sorted((a, b))
    assert pass_probability(low, sd, n, alpha) <= pass_probability(high, sd, n, alpha) + 1e-9
    assert 0 <= pass_probability(-low, sd, n, alpha) <= alpha + 1e-9, "means above the target pass less often"


@settings(max_examples=200)
@given(margins, spreads, counts, counts, levels)
def test_power_grows_with_the_runs(margin, sd, a, b, alpha):
    few, many = sorted((a, b))
    assert pass_probability(margin, sd, few, alpha) <= pass_probability(margin, sd, many, alpha) + 1e-9


@given(margins, spreads, spreads, counts)
def test_power_falls_with_the_spread(margin, a, b, n):
    calm, noisy = sorted((a, b))
    assert pass_probability(margin, calm, n) >= pass_probability(margin, noisy, n) - 1e-9


@given(spreads, counts, levels)
def test_without_a_margin_power_is_the_level(sd, n, alpha):
    assert pass_probability(0, sd, n, alpha) == pytest.approx(alpha, rel=1e-6)


def test_power_stays_a_probability_far_out():
    far = (0.05, 1e-4, 1000), (-0.05, 1e-4, 1000), (0.01, 1e-4, 2), (1e-12, 1, 2), (0.002, 0.001, 10**6)
    for margin, sd, n in far:
        power = pass_probability(margin, sd, n)
        assert 0 <= power <= 1 and not math.isnan(power), (margin, sd, n)
    assert pass_probability(0.05, 1e-4, 1000) == pytest.approx(1)
    table = pass_probability(np.array([[0.0], [0.001]]), 0.0012, np.array([4, 10]))
    assert table.shape == (2, 2) and table[1, 1] == pass_probability(0.001, 0.0012, 10)


@pytest.mark.parametrize(("margin", "sd", "n"), [
    (0.001, 0.0012, 4), (0.001, 0.0019, 25), (0.0005, 0.0012, 60), (0, 0.004, 3)])
def test_power_agrees_with_simulation(margin, sd, n):
    exact, trials = pass_probability(margin, sd, n), 30_000
    simulated = simulate_submissions(margin, sd, n, trials, seed=11).passed.mean()
    assert abs(simulated - exact) < 4 * math.sqrt(exact * (1 - exact) / trials)


@settings(max_examples=50)
@given(st.floats(2e-4, 0.01), st.floats(5e-4, 0.004), st.floats(0.05, 0.99), st.sampled_from([0.001, 0.01, 0.05]))
def test_runs_needed_is_the_smallest_number(margin, sd, power, alpha):
    n = runs_needed(margin, sd, power, alpha)
    assert pass_probability(margin, sd, n, alpha) >= power
    assert n == 2 or pass_probability(margin, sd, n - 1, alpha) < power


def test_a_submission_passes_when_its_p_value_does():
    margin, sd, n, count, seed = 0.001, 0.0012, 6, 300, 5
    table = simulate_submissions(margin, sd, n, count, seed)
    losses = np.random.default_rng(seed).normal(3.28 - margin, sd, (count, n))
    assert table["mean"].to_numpy() == pytest.approx(losses.mean(axis=1))
    assert table["passed"].tolist() == [p_below_target(row) < 0.01 for row in losses]
    assert 0 < table["passed"].sum() < count


@given(st.lists(st.floats(3.2, 3.4), min_size=3, max_size=20), st.lists(st.floats(3.2, 3.4), min_size=3, max_size=20))
def test_welch_agrees_with_scipy_and_turns_around(a, b):
    if min(np.std(a), np.std(b)) < 1e-6:
        return
    there, back = welch(a, b), welch(b, a)
    assert there.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert there.low <= there.difference <= there.high
    assert (there.p < 0.05) == (there.low * there.high > 0)


def test_intervals_cover_what_they_promise():
    rng = np.random.default_rng(0)
    inside = sum(low <= 2 <= high for _, low, high in (sd_interval(rng.normal(0, 2, 8)) for _ in range(4000)))
    assert abs(inside / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)
    tests = [welch(rng.normal(1, 1, 6), rng.normal(0, 3, 12)) for _ in range(1500)]
    inside = sum(test.low <= 1 <= test.high for test in tests) / 1500
    assert abs(inside - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1500)


def test_running_t_statistics_are_those_of_scipy():
    losses = np.random.default_rng(1).normal(0.1, 1, (3, 12))
    running = t_statistics(losses)
    for k in range(2, 13):
        assert running[:, k - 1] == pytest.approx(stats.ttest_1samp(losses[:, :k], 0, axis=1).statistic)
    assert np.isnan(running[:, 0]).all(), "one run has no spread"


def test_habits_inflate_and_remedies_do_not():
    error = 4 * math.sqrt(0.01 * 0.99 / 20_000)
    assert abs(peeking_rate(8, 8) - 0.01) < error and abs(dropping_rate(10, 0) - 0.01) < error
    assert peeking_rate(4, 10) < peeking_rate(4, 20) < peeking_rate(4, 50)
    assert best_of_rate(2) < best_of_rate(8) <= 1 - 0.99**8 + 0.02
    assert abs(best_of_rate(8, fresh=True) - 0.01) < 4 * math.sqrt(0.01 * 0.99 / 5_000)
    assert peeking_rate(4, 20, alpha=0.01 / 17) < 0.01, "Bonferroni's correction is safe"
    assert peeking_rate(4, 20, margin=1) > 0.9, "a real margin is found"


def test_exchange_rate():
    line = pd.DataFrame({"step": range(0, 1000, 10), "val_loss": [4 - 2e-4 * step for step in range(0, 1000, 10)]})
    assert loss_per_step(line) == pytest.approx(2e-4) and loss_per_step(line, 20) == pytest.approx(2e-4)
    table = rerun_table()
    assert table.loc["81", "per_step"] * 50 == pytest.approx(3.28674 - 3.27875, abs=1e-5)
    assert table.loc["82", "per_step"] * 30 == pytest.approx(3.28316 - 3.27941, abs=1e-5)
    assert (table["slope"] > table["per_step"] + table["error"]).all()


def test_groups_are_the_ones_named():
    runs = own_runs()
    sizes = {"14": 40, "17": 1261, "18": 80, "21": 81, "37": 24}
    assert {i: len(runs[i]) for i in sizes} == sizes
    assert min(map(len, runs.values())) == 3 and "9" not in runs
    assert pooled_sd({"1": np.array([1.0, 3.0]), "2": np.array([1.0, 5.0])}, 1, 2) == pytest.approx(math.sqrt(10 / 2))
    for comparisons in (EQUAL_STEPS, EQUAL_LOSS):
        for label, (record, new, old) in comparisons.items():
            assert label.startswith(record)
            steps = [load_samples(record, group).steps.unique() for group in (new, old)]
            assert all(len(s) == 1 for s in steps)
            assert comparisons is EQUAL_LOSS or steps[0] == steps[1], f"{label}: steps differ"
    assert loss_differences(EQUAL_STEPS).loc["82 XSA (H200)", "difference"] == pytest.approx(3.27865 - 3.28316)


def test_figures_say_what_they_show():
    assert "0 of 200" in draw_submissions(margin=-0.002, n=10).axes[0].get_title()
    assert "200 of 200" in draw_submissions(margin=0.004, n=20).axes[0].get_title()
    assert len(draw_power(0.002).axes[0].get_legend().get_texts()) == 5
    assert len(draw_inflation().axes[0].patches) == 8
    names = [tick.get_text() for tick in draw_matched().axes[0].get_yticklabels()]
    assert set(EQUAL_STEPS) | set(EQUAL_LOSS) <= set(names)
    assert len(draw_spread().axes) == len(draw_exchange().axes) == 2
