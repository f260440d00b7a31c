"""Plots from sample rows."""

import pytest
from bench_rows import sample_rows
from plot import draw_all

pytest.importorskip("matplotlib")


def test_every_plot_is_drawn_from_its_rows(tmp_path):
    rows = sample_rows(tmp_path / "rows.jsonl")
    made = draw_all(rows, tmp_path / "plots")
    assert [path.name for path in made] == ["throughput.svg", "step_time.svg", "latency.svg"]
    throughput, step_time, latency = (path.read_text() for path in made)
    for text in (throughput, step_time, latency):
        assert "llama-135m" in text
        assert "commit abc1234" in text
        assert len(text) < 60_000
    assert "running sequences" in throughput
    assert "llama-135m, B = 32" in step_time
    assert "32k" in step_time
    assert "first token p99" in latency
    assert "between tokens p50" in latency


def test_a_plot_changes_only_with_its_rows(tmp_path):
    rows = sample_rows(tmp_path / "rows.jsonl")
    before = [path.read_bytes() for path in draw_all(rows, tmp_path / "a")]
    assert [path.read_bytes() for path in draw_all(rows, tmp_path / "b")] == before
    rows[-1]["value"] += 1  # an import's, which no plot shows
    assert [path.read_bytes() for path in draw_all(rows, tmp_path / "c")] == before
    grown = next(row for row in rows if row.get("running") == 512)
    grown["value"] *= 2
    after = [path.read_bytes() for path in draw_all(rows, tmp_path / "d")]
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_no_rows_no_plots(tmp_path):
    assert draw_all([], tmp_path) == []
