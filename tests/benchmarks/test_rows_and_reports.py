"""Rows survive a killed run, know what was measured, and become the tables of the documents."""

import json

import pytest
from bench_rows import GPU, sample_rows
from environment import describe_environment
from plan import Plan
from reference import WORKLOADS_H100
from report import (
    DOCUMENT,
    PUBLISHED,
    TABLES,
    comparison,
    publish,
    section_text,
    table,
    update_document,
)
from rows import REQUIRED, RowFile, check_row, latest, load_rows
from sections.latency import arrivals, percentile

# ------------------------------------------------------------------ rows


def test_a_row_says_where_it_was_measured(tmp_path):
    row = RowFile(tmp_path / "rows.jsonl", GPU).add("table", "x", 1.5, "s", shape="tiny")
    assert set(REQUIRED) <= set(row)
    assert load_rows(tmp_path / "rows.jsonl") == [row]
    assert set(GPU) - {"is_quick"} <= set(describe_environment("abc1234"))
    assert describe_environment("abc1234")["commit"] == "abc1234"


@pytest.mark.parametrize("name", REQUIRED)
def test_a_row_without_its_origin_is_refused(name):
    row = {**GPU, "dtype": "bfloat16", "section": "table", "name": "x", "value": 1.0, "unit": "s"}
    check_row(row)
    del row[name]
    with pytest.raises(ValueError, match=name):
        check_row(row)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1.0", True])
def test_a_figure_is_a_finite_number(tmp_path, value):
    with pytest.raises(ValueError, match="no finite number"):
        RowFile(tmp_path / "rows.jsonl", GPU).add("table", "x", value, "s")


def test_a_line_cut_short_by_a_kill_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(path, GPU).add("table", "x", 1.0, "s")
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert [row["name"] for row in load_rows(path)] == ["x"]
    rows = RowFile(path, GPU, resume=True)
    rows.add("table", "y", 2.0, "s")
    assert [row["name"] for row in load_rows(path)] == ["x", "y"]
    path.write_text("nonsense\n" + whole)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1"):
        load_rows(path)


def test_resume_knows_rows_of_the_same_code_and_machine(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(path, GPU).add("table", "x", 1.0, "s")
    assert RowFile(path, GPU, resume=True).has("table", "x")
    assert not RowFile(path, GPU, resume=True).has("busy", "x")
    assert not RowFile(path, GPU).has("table", "x")
    for name, other in (("commit", "fff"), ("gpu", None), ("torch", "2.13"), ("is_quick", True)):
        assert not RowFile(path, {**GPU, name: other}, resume=True).has("table", "x")


def test_the_newest_row_counts():
    rows = [{"section": "table", "name": "x", "value": value} for value in (1, 2)]
    assert latest(rows, "table")["x"]["value"] == 2
    assert latest(rows, "busy") == {}


def test_a_plan_survives_the_command_line():
    plan = Plan(device="cpu", shapes=("tiny",), workloads=("chat",), rates=(2.0,), environment=GPU)
    assert Plan.from_json(plan.to_json()) == plan


# ------------------------------------------------------------------ tables


def test_the_comparison_shows_every_section(tmp_path):
    text = comparison(sample_rows(tmp_path / "rows.jsonl"))
    for name in TABLES:
        assert f"## {name}\n" in text
    assert "commit abc1234; date 2026-11-25; gpu NVIDIA H100 80GB HBM3" in text


def test_the_table_compares_with_the_others_and_the_goal(tmp_path):
    lines = table(sample_rows(tmp_path / "rows.jsonl")).splitlines()
    chat = next(line for line in lines if "| chat |" in line)
    reference = WORKLOADS_H100["llama-135m", "chat"]
    assert reference == (13.0, 6.80, 2.2)
    # 2.0 s beat SGLang's 6.8 by 3.4 and the goal of 2.2.
    expected = "| llama-135m | chat | 2.500 | 2.000 | 13 | 6.8 | 2.2 ✓ | 3.40× | 107470 | 0.40 ✓ |"
    assert chat.startswith(expected)
    start = next(line for line in lines if "| start |" in line)
    assert start.startswith("| llama-135m | start | 4.9 |  | 60-90 | 57 | 15 ✓ | 11.6× |")


def test_goals_stand_beside_what_was_reached(tmp_path):
    rows = sample_rows(tmp_path / "rows.jsonl")
    assert "| 80 % (≥ 75 %) | 70 % (≥ 60 %) |" in section_text("busy", rows)
    assert "| 6 ms, 80 % of floor | 2.4 ms, 80 % of floor, 2.50× |" in section_text("rounded", rows)
    assert "| ChatLocal.batch | 1000 | 2.200 | +10.0% | ≤ +15% |" in section_text(
        "frameworks", rows
    )
    assert "| decode_tok_s | 60 | 30 | 2.00 | ≥ 120 |" in section_text("cpu", rows)
    kept = "| decode_tok_s, busy neighbour | 45 |  |  | 75 % kept (≥ 50 %) |"
    assert kept in section_text("cpu", rows)
    assert "| ChatLocal.batch | 1000 | 2.20 | +5% | 100 |" in section_text("host", rows)
    assert "| constrained | 64 | 1.050 | +5.0% (≤ +10%) | 11429 | 200 |" in section_text(
        "constrained", rows
    )
    assert "| ms/step at B = 32 | 1024 | 1.02 |" in section_text("growth", rows)
    assert "| texts_s | 200 texts/s | 100 | 2.00× |" in section_text("embed", rows)
    assert "| query_ms | 2 ms | 5 | 2.50× |" in section_text("embed", rows)
    assert "| gathered_texts_s | 150 texts/s | 100 | 1.50× |" in section_text("embed", rows)


def test_a_slower_run_gets_no_tick(tmp_path):
    rows = sample_rows(tmp_path / "rows.jsonl")
    for row in rows:
        row["value"] *= 10
    assert "2.2 ✓" not in table(rows)
    assert "| 2.2 | 0.34× |" in table(rows)


def test_only_marked_tables_with_rows_are_rewritten(tmp_path):
    rows = sample_rows(tmp_path / "rows.jsonl")
    text = "before\n<!-- rows: busy -->\nold\n<!-- end -->\nprose\n"
    made = update_document(text, rows)
    assert made.startswith("before\n<!-- rows: busy -->\n\n| engine |")
    assert made.endswith("\n<!-- end -->\nprose\n")
    assert "old" not in made
    assert update_document(made, rows) == made
    assert update_document(text, []) == text
    with pytest.raises(ValueError, match="nonsense"):
        update_document(text.replace("busy", "nonsense"), rows)


def test_published_rows_are_the_newest_ones(tmp_path):
    source, target = tmp_path / "rows.jsonl", tmp_path / "published.jsonl"
    sample_rows(source)
    publish(source, target)
    RowFile(source, {**GPU, "commit": "def5678"}).add(
        "callers", "ChatLocal.batch", 9.0, "µs/request"
    )
    publish(source, target)
    rows = load_rows(target)
    assert [row["value"] for row in rows if row["section"] == "callers"] == [9.0]
    assert len(rows) == len(load_rows(source)) - 1


@pytest.mark.parametrize("bad", [{"is_quick": True}, {"commit": None}])
def test_rows_that_prove_nothing_are_not_published(tmp_path, bad):
    source = tmp_path / "rows.jsonl"
    RowFile(source, {**GPU, **bad}).add("callers", "x", 1.0, "s")
    with pytest.raises(ValueError, match="quick run or has no commit"):
        publish(source, tmp_path / "published.jsonl")
    assert not (tmp_path / "published.jsonl").exists()


def test_the_documents_tables_are_those_of_the_published_rows():
    text = DOCUMENT.read_text()
    assert "<!-- rows: table -->" in text
    assert update_document(text, load_rows(PUBLISHED)) == text
    for row in load_rows(PUBLISHED):
        check_row(row)
        assert json.dumps(row)


# ------------------------------------------------------------------ arithmetic


def test_percentiles():
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0


def test_arrivals_come_at_the_rate_and_repeat():
    due = arrivals(50.0, 20.0, seed=1)
    assert due == sorted(due) == arrivals(50.0, 20.0, seed=1)
    assert due[-1] < 20.0
    assert 850 < len(due) < 1150
    assert due != arrivals(50.0, 20.0, seed=2)
