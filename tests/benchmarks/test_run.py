"""Every section runs from one command, keeps its rows when killed, and resumes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sections.growth
import sections.table
from plan import Job
from rows import load_rows
from run import CPU_SECTIONS, GPU_SECTIONS, make_parser, make_plan, run_job, run_section
from text_chat_templates import CHATML
from text_tokenizers import trained_byte_level, write_folder

SCRIPT = Path(sections.table.__file__).parents[1] / "run.py"


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_folder(folder, trained_byte_level("qwen2"), eos_token="</s>", chat_template=CHATML)
    return folder


def run(rows, text_model, *arguments):
    """`run.py --quick` on the tiny model; its output."""
    return subprocess.run(
        [
            sys.executable,
            SCRIPT,
            *("--quick", "--device", "cpu", "--rates", "30", "--commit", "abc1234"),
            *("--rows", rows, "--text-model", text_model, *arguments),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    ).stdout


def names_of(rows, section):
    return [row["name"] for row in load_rows(rows) if row["section"] == section]


def test_the_table_section_and_resuming_it(tmp_path, text_model):
    rows = tmp_path / "rows.jsonl"
    output = run(rows, text_model, "--only", "table", "--workloads", "single,chat")
    expected = ["tiny/start"]
    expected += [f"tiny/{name}/{run}" for name in ("single", "chat") for run in ("first", "second")]
    assert names_of(rows, "table") == expected
    assert "| tiny | chat |" in output
    assert "| tiny | chat |" in (tmp_path / "comparison.md").read_text()
    for row in load_rows(rows):
        assert row["commit"] == "abc1234"
        assert row["value"] > 0
        assert row["kv_blocks"] > 0
        assert row["is_quick"]
    second = load_rows(rows)[-1]
    assert second["steps"] >= 12
    assert 0 < second["host_ms_per_step"] < 1000
    # A row is missing: only its shape runs again. Then nothing does.
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:30])
    run(rows, text_model, "--only", "table", "--workloads", "single,chat", "--resume")
    assert names_of(rows, "table")[-1] == expected[-1]
    before = rows.read_text()
    output = run(rows, text_model, "--only", "table", "--workloads", "single,chat", "--resume")
    assert "measured before" in output
    assert rows.read_text() == before


EXPECTED = {
    "busy": ["tiny/spinners-0", "tiny/spinners-1", "tiny/spinners-4"],
    "latency": ["tiny/rate-30"],
    "growth": ["tiny/running-1", "tiny/running-8", "tiny/context-256x1", "tiny/context-512x4"],
    "frameworks": ["tiny/Engine.generate", "tiny/ChatLocal.abatch", "tiny/LocalLLM.achat x8"],
    "host": ["Engine.generate", "ChatLocal.abatch", "LocalLLM.achat x12"],
    "llama_index": [
        *("ingest/ours-stock", "ingest/ours-group", "ingest/engine-group"),
        *("achat/256", "aquery/64-engine", "overhead/achat"),
    ],
    "callers": [
        "Engine.chat",
        "ChatLocal.batch",
        "ChatLocal.astream x16",
        "LocalLLM.achat x16",
        "bind 10 tools, any",
    ],
}


@pytest.mark.parametrize("section", EXPECTED)
def test_every_section_runs_on_a_tiny_model(tmp_path, text_model, section):
    rows = tmp_path / "rows.jsonl"
    output = run(rows, text_model, "--only", section)
    assert set(EXPECTED[section]) <= set(names_of(rows, section))
    assert f"## {section}\n" in output


@pytest.mark.embedding_model
@pytest.mark.usefixtures("embedding_model")
def test_the_embed_section_runs(tmp_path, text_model):
    rows = tmp_path / "rows.jsonl"
    output = run(rows, text_model, "--only", "embed")
    expected = {f"all-minilm-l6-v2/{peer}/texts_s" for peer in ("ours", "loop")}
    assert expected <= set(names_of(rows, "embed"))
    assert "## embed\n" in output


@pytest.mark.demo_model
@pytest.mark.slow
def test_the_cpu_section_runs_on_the_demo_model(tmp_path, text_model):
    rows = tmp_path / "rows.jsonl"
    run(rows, text_model, "--only", "cpu")
    assert {"ours/decode_tok_s", "ours/w16_tok_s", "import/engine"} <= set(names_of(rows, "cpu"))


# ------------------------------------------------------------------ budgets


def plan_for(tmp_path, *arguments):
    rows = ("--rows", str(tmp_path / "rows.jsonl"))
    options = make_parser().parse_args(
        ["--quick", "--device", "cpu", "--commit", "abc1234", *rows, *arguments]
    )
    return make_plan(options)


def test_a_job_over_its_time_is_killed_and_its_rows_stay(tmp_path, capfd):
    plan = plan_for(tmp_path)
    job = Job("table", "tiny/all", {"shape": "tiny", "placement": "default"}, ())
    started_s = time.monotonic()
    assert not run_job(job, plan, 0.5)
    assert time.monotonic() - started_s < 10.0
    assert "ended early" in capfd.readouterr().out
    assert f"{tmp_path}/rows.jsonl" not in running_commands()


def test_a_run_that_is_stopped_takes_its_child_along(tmp_path):
    rows = tmp_path / "rows.jsonl"
    process = subprocess.Popen(
        [
            *(sys.executable, SCRIPT, "--quick", "--device", "cpu", "--commit", "abc1234"),
            *("--only", "table", "--rows", rows),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 60.0
    while not rows.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    process.terminate()
    assert "--resume" in process.communicate(timeout=30.0)[1]
    assert str(rows) not in running_commands()
    assert load_rows(rows)


def running_commands():
    """Command lines of everything that runs."""
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_job_that_fails_is_told_of(tmp_path, capfd):
    job = Job("table", "nonsense", {"shape": "nonsense", "placement": "default"}, ())
    assert not run_job(job, plan_for(tmp_path), 60.0)
    assert "exit code 1" in capfd.readouterr().out


def test_a_section_without_time_left_is_incomplete(tmp_path, capfd):
    assert not run_section("table", plan_for(tmp_path), 1.0)
    assert "left out" in capfd.readouterr().out


def test_gpu_sections_have_no_jobs_on_a_cpu(tmp_path):
    plan = plan_for(tmp_path)
    assert run_section("memory", plan, 100.0)
    assert run_section("kernels", plan, 100.0)


def test_placements_have_rows_of_their_own(tmp_path):
    plan = plan_for(tmp_path, "--placement", "default,process", "--workloads", "chat")
    jobs = sections.table.jobs(plan)
    assert [job.arguments["placement"] for job in jobs] == ["default", "process"]
    assert "tiny/chat/first" in jobs[0].names
    assert "tiny@process/chat/second" in jobs[1].names
    assert not set(jobs[0].names) & set(jobs[1].names)


@pytest.mark.parametrize("option", ["--shapes", "--workloads"])
def test_unknown_names_are_refused(tmp_path, option):
    with pytest.raises(SystemExit, match=r"There is no \w+ 'nonsense'"):
        plan_for(tmp_path, option, "nonsense")


def test_every_section_has_a_module():
    for name in (*GPU_SECTIONS, *CPU_SECTIONS):
        __import__(f"sections.{name}")


def test_longer_contexts_continue_the_same_prompts():
    short = sections.growth.random_requests(3, 16, 1, 1000)
    long = sections.growth.random_requests(3, 32, 1, 1000)
    assert [prompt for prompt, _ in short] == [prompt[:16] for prompt, _ in long]
    assert len({tuple(prompt) for prompt, _ in short}) == 3
