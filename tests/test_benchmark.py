"""The benchmark's arithmetic, and that it refuses to compare different work."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmark import accelerator, scaling, system, timing, training
from experiments.benchmark.__main__ import cases, draw, reached
from experiments.benchmark.timing import Row, check_close, duel, duel_by_tokens
from rlhf_jax.stages.pretrain import lm_loss


@pytest.fixture
def sleep(monkeypatch):
    """A clock that only this moves."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_duel_is_their_time_over_ours(sleep):
    row = duel("c", lambda: sleep(0.01), "them", lambda: sleep(0.03), 3, 2.0)
    np.testing.assert_allclose([row.low, row.ratio, row.high], 3.0)
    assert reached(row)


def test_more_tokens_in_the_same_time_are_faster(sleep):
    def side(tokens):
        return lambda: sleep(0.02) or tokens

    row = duel_by_tokens("c", side(30), "them", side(10), 3, 5.0)
    np.testing.assert_allclose(row.ratio, 3.0)
    assert not reached(row)


def test_bytes_are_reached_from_above():
    row = Row("head/memory", "", 0.5, 0.5, 0.5, "of its bytes", 0.55)
    assert reached(row)
    assert not reached(dataclasses.replace(row, ratio=0.6))
    assert reached(dataclasses.replace(row, goal=None)) is None


def test_different_work_is_not_timed():
    check_close("c", 1.0, 1.00001)
    with pytest.raises(SystemExit, match="do not do the same work"):
        check_close("c", 1.0, 1.01)


def test_the_formula_counts_the_programs_products():
    """Forward and backward as XLA counts them, which knows no causal half."""
    cfg = dataclasses.replace(training.model_config(1024), remat="none")
    batch, _, _ = system._problem(cfg, 2, 128)
    params = jax.eval_shape(lambda: training.init_params(jax.random.key(0), cfg))
    grad = jax.jit(jax.grad(lambda p: lm_loss(p, batch, None, model=cfg)[0]))  # type: ignore
    analysis = grad.lower(params).compile().cost_analysis()
    formula = training.train_flops(cfg, 2 * 128, 2 * 128)  # both halves
    assert formula == pytest.approx(analysis["flops"], rel=0.1)


def test_the_figure_is_drawn_and_every_group_has_cases(tmp_path):
    rows = [Row("a", "", 2.0, 1.5, 2.5, "times as fast", 1.3)]
    draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert all(cases(1, tmp_path).values())


def test_a_scaling_plot_has_every_axis(tmp_path, monkeypatch):
    rates = np.array([0.5e9, 1e9])
    monkeypatch.setattr(scaling, "flops_per_second", lambda repeats, **shape: rates)
    monkeypatch.setattr(scaling, "matmul_flops", lambda: 4e9)
    rows = scaling.scaling(tmp_path, 1)
    assert [row.case for row in rows] == [f"scaling/{axis}" for axis in scaling.AXES]
    for row in rows:  # of every repetition over the base's median
        assert (row.low, row.ratio, row.high) == pytest.approx((2 / 3, 1.0, 4 / 3))
    assert "0.25" in rows[0].note
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_floors_grow_with_what_is_read_and_computed():
    """A step of a rollout takes the longer of its bytes and its FLOPs."""
    cfg = training.model_config(1024)
    slow = accelerator.rollout_floor(cfg, 8, 16, 8, rate=1e9, bandwidth=1e15)
    assert slow == pytest.approx(
        2 * (12 * 4 * 256**2 * 8 * (16 + 8) + 1024 * 256 * 8 * 8) / 1e9
    )
    read = accelerator.rollout_floor(cfg, 8, 16, 8, rate=1e18, bandwidth=1e9)
    cache = 8 * (16 + 4) * 4 * 4 * 256
    weights = 2 * (12 * 4 * 256**2 + 1024 * 256)
    assert read == pytest.approx(8 * (cache + weights) / 1e9, rel=1e-3)
