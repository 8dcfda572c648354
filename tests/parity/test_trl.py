"""PPO beside TRL: the benchmark's two iterations start from the same numbers."""

import pytest

pytest.importorskip("trl", reason="needs the extra [bench]")

from experiments.benchmark.ppo import Workload, against_trl, probe  # noqa: E402


@pytest.fixture
def work(tiny):
    return Workload(tiny(), 4, 8, 8, epochs=1, microbatch=2)


@pytest.mark.filterwarnings("ignore")  # those of transformers and TRL
def test_both_sides_of_a_ppo_duel_compute_the_same_loss_score_and_kl(work):
    """`against_trl` ends the program where they do not."""
    row = against_trl("ppo/tiny", work, repeats=1, goal=None)
    assert row[0].ratio > 0


@pytest.mark.filterwarnings("ignore")
def test_a_ppo_duel_of_different_networks_is_refused(work, monkeypatch):
    def other(start, cfg):
        loss, score = probe(start, cfg)
        return loss, score + 0.1

    monkeypatch.setattr("experiments.benchmark.ppo.probe", other)
    with pytest.raises(SystemExit, match="do not do the same work"):
        against_trl("ppo/tiny", work, repeats=1, goal=None)
