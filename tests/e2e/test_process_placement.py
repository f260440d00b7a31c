"""An engine in a child process: how it starts, and how either side's end is noticed."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import engine.placement.child
import engine.placement.remote
from engine import (
    Engine,
    EngineClosedError,
    EngineDeadError,
    ModelNotFoundError,
    SamplingParams,
    StepError,
)

LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def child_pid(eng: Engine) -> int:
    return eng._host._child.pid  # type: ignore[attr-defined, no-any-return]


def is_running(pid: int) -> bool:
    """False for a process that is gone or waits to be reaped by whoever adopted it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def make_engine(tiny_llama: Path) -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        return Engine(str(tiny_llama), device="cpu", num_threads=1, placement="process", **options)

    return make


def run_python(
    *arguments: str, cwd: Path | None = None, stdin: str | None = None
) -> tuple[int, str, str]:
    """Exit code, stderr and stdout of a Python with `arguments`."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr, done.stdout


# -------------------------------------------------------------------- the start

SCRIPT = """
import sys
from engine import Engine, SamplingParams
engine = Engine(sys.argv[1], device="cpu", num_threads=1, placement="process")
print(len(engine.generate("in the", SamplingParams(max_tokens=4, ignore_eos=True)).outputs))
{more}
engine.close()
"""


def test_a_script_without_a_main_guard_in_a_folder_full_of_traps(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Neither the current directory nor the script's own is where the child looks for modules."""
    for name in ("json.py", "engine.py", "torch.py", "socket.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the current directory')")
    folder = tmp_path / "scripts"
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT.format(more="print('once')"))
    (folder / "helper.py").write_text("")
    arguments = (str(script), str(tiny_llama), "--unknown", "options")
    assert run_python(*arguments, cwd=tmp_path) == (0, "", "1\nonce\n")


def test_dash_c_and_standard_input(tiny_llama: Path) -> None:
    code = SCRIPT.format(more="")
    assert run_python("-c", code, str(tiny_llama)) == (0, "", "1\n")
    assert run_python("-", str(tiny_llama), stdin=code) == (0, "", "1\n")


def test_the_child_runs_the_parents_package(tiny_llama: Path, tmp_path: Path) -> None:
    """Found by a path that only the parent's `sys.path` knows, and where another comes first."""
    import engine as package

    (tmp_path / "decoy" / "engine").mkdir(parents=True)
    (tmp_path / "decoy" / "engine" / "__init__.py").write_text("raise SystemExit('decoy')")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "engine").symlink_to(Path(package.__file__).parent)
    code = f"""
    import sys
    sys.path.insert(0, {str(elsewhere)!r})
    import engine
    sys.path.insert(0, {str(tmp_path / "decoy")!r})
    import os
    eng = engine.Engine({str(tiny_llama)!r}, device="cpu", num_threads=1, placement="process")
    maps = open(f"/proc/{{eng._host._child.pid}}/cmdline").read()
    assert {str(elsewhere)!r} in maps, maps
    assert eng.generate([5], engine.SamplingParams(max_tokens=1)).outputs
    """
    assert run_python("-c", textwrap.dedent(code)) == (0, "", "")


def test_in_a_running_event_loop_and_a_thread_that_ends(make_engine: Callable[..., Engine]) -> None:
    """As in a notebook. Linux would kill a child together with the thread that started it."""
    import asyncio

    async def main() -> int:
        with ThreadPoolExecutor(1) as executor:
            engine = await asyncio.get_running_loop().run_in_executor(executor, make_engine)
        await asyncio.sleep(0.1)
        with engine:
            output = await engine.submit("in the", SHORT)
            return len(output.outputs[0].token_ids)

    assert asyncio.run(main()) == 5


def test_the_parent_needs_no_torch_and_holds_no_weights(tiny_llama: Path) -> None:
    more = "print([name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    assert run_python("-c", SCRIPT.format(more=more), str(tiny_llama)) == (0, "", "1\n[]\n")


def test_a_missing_model_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.placement.remote, "Child", None)
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        Engine("./no-such-model", placement="process")


def test_a_child_that_cannot_start_says_why(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "no-python"))
        with pytest.raises(engine.ConfigError, match=r"could not start '.*no-python'"):
            make_engine()
        patch.setattr(sys, "executable", "")
        with pytest.raises(engine.ConfigError, match="starts a second Python interpreter"):
            make_engine()
    monkeypatch.setattr(
        engine.placement.child, "_BOOTSTRAP", "import sys; sys.exit('no luck today')"
    )
    with pytest.raises(EngineDeadError, match=r"exit code 1\. .*stderr:\nno luck today"):
        make_engine()


def test_a_child_that_hangs_at_the_start_is_ended(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine.placement.child,
        "_BOOTSTRAP",
        "import sys, time; print('hm', file=sys.stderr, flush=True); time.sleep(600)",
    )
    monkeypatch.setattr(engine.placement.remote, "_HELLO_TIMEOUT_S", 1.0)
    before = set(threading.enumerate())
    started_s = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"was not up after 1 s.*\nhm"):
        make_engine()
    assert time.monotonic() - started_s < 5
    assert not set(threading.enumerate()) - before


def test_connectors_pass_the_placement_on(tiny_llama: Path) -> None:
    """Both frameworks, one engine between them."""
    langchain = pytest.importorskip("llm_connectors.langchain")
    llama_index = pytest.importorskip("llm_connectors.llama_index")
    options = {"placement": "process", "device": "cpu", "num_threads": 1}
    chat = langchain.ChatLocal(
        model=str(tiny_llama), engine_kwargs=options, temperature=0.0, max_tokens=6
    )
    llm = llama_index.LocalLLM(
        model=str(tiny_llama), engine_kwargs=options, temperature=0.0, max_tokens=6
    )
    text = chat.invoke("in the").content
    assert "".join(piece.content for piece in chat.stream("in the")) == text
    assert [message.content for message in chat.batch(["in the"] * 3)] == [text] * 3
    assert llm.engine is chat._engine()
    assert llm.engine.config.placement == "process"
    pid = child_pid(llm.engine)
    chat.close()
    llm.close()
    assert not is_running(pid)


# -------------------------------------------------------------------- the child dies


def test_a_killed_child_answers_every_caller_at_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    waiting = engine.submit("in the", LONG)
    stream = iter(engine.submit("in the", LONG))
    next(stream)
    os.kill(child_pid(engine), signal.SIGKILL)
    started_s = time.monotonic()
    for read in (lambda: waiting.result(timeout=10), lambda: list(stream)):
        with pytest.raises(EngineDeadError, match=r"killed by signal 9 \(Killed\).*memory"):
            read()
    assert time.monotonic() - started_s < 1
    with pytest.raises(EngineDeadError, match="signal 9"):
        engine.submit("in the", SHORT)
    assert engine.is_closed
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.requests_failed == 2
    engine.close()
    engine.close()


def test_a_reply_that_cannot_be_read_is_the_cause(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    broken = ValueError("not a reply")

    def take(messages: object) -> None:
        raise broken

    monkeypatch.setattr(engine._host, "_take", take)
    handle = engine.submit("in the", LONG)
    with pytest.raises(EngineDeadError) as caught:
        handle.result(timeout=10)
    assert caught.value.__cause__ is broken
    engine.close()


def test_a_crash_is_told_with_the_last_words(
    make_engine: Callable[..., Engine], capfd: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine()
    handle = engine.submit("in the", LONG)
    os.kill(child_pid(engine), signal.SIGSEGV)
    with pytest.raises(EngineDeadError, match=r"signal 11[\s\S]*Fatal Python error: Segmentation"):
        handle.result(timeout=10)
    assert "Fatal Python error" in capfd.readouterr().err


# Runs in the child before anything else (Python imports a module of this name by itself), and
# breaks a method there once the trigger exists.
_SABOTAGE = """
import os, sys, threading, time
def watch():
    while not os.path.exists({trigger!r}):
        time.sleep(0.002)
    module = sys.modules[{module!r}]
    owner = getattr(module, {owner!r})
    original = getattr(owner, {method!r})
    def broken(*args, **kwargs):
        if {once!r}:
            setattr(owner, {method!r}, original)
        raise {error}
    setattr(owner, {method!r}, broken)
threading.Thread(target=watch, daemon=True).start()
"""


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def sabotage(module: str, owner: str, method: str, error: str, once: bool = False) -> Path:
        trigger = tmp_path / "trigger"
        (tmp_path / "sitecustomize.py").write_text(
            _SABOTAGE.format(
                trigger=str(trigger),
                module=module,
                owner=owner,
                method=method,
                error=error,
                once=once,
            )
        )
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        monkeypatch.setenv("PYTHONPATH", path)
        return trigger

    return sabotage


def test_a_dead_loop_tells_every_caller_the_cause(
    make_engine: Callable[..., Engine],
    sabotage: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trigger = sabotage(
        "engine.core.scheduler", "Scheduler", "schedule", "ZeroDivisionError('planted')"
    )
    engine = make_engine()
    waiting = engine.submit("in the", LONG)
    trigger.touch()
    with pytest.raises(EngineDeadError, match="ZeroDivisionError: planted") as caught:
        waiting.result(timeout=10)
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    assert "in _step" in str(cause.__cause__)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError: planted"):
        engine.submit("in the", SHORT)
    assert engine.is_closed
    engine.close()
    # The child's log comes out of the parent's logger.
    (record,) = [r for r in caplog.records if r.name == "engine.loop"]
    assert record.levelno == logging.ERROR
    assert "ZeroDivisionError: planted" in str(record.exc_text)


def test_a_failed_step_ends_its_requests_and_nothing_else(
    make_engine: Callable[..., Engine], sabotage: Callable[..., Path]
) -> None:
    trigger = sabotage(
        "engine.runner.model_runner",
        "ModelRunner",
        "execute",
        "MemoryError('out of memory, says the test')",
        once=True,
    )
    with make_engine() as engine:
        handle = engine.submit("in the", LONG)
        assert eventually(lambda: engine.stats().output_tokens > 5)
        trigger.touch()
        with pytest.raises(StepError, match="out of memory, says the test") as caught:
            handle.result(timeout=10)
        assert isinstance(caught.value.__cause__, MemoryError)
        assert len(engine.generate("in the", SHORT).outputs[0].token_ids) == 5
        assert engine.stats().requests_failed == 1


# -------------------------------------------------------------------- the parent dies

_ORPHAN = """
import os, sys, time
from engine import Engine, SamplingParams
engine = Engine(sys.argv[1], device="cpu", num_threads=1, placement="process")
handle = engine.submit("in the", SamplingParams(max_tokens=400, ignore_eos=True))
if sys.argv[2] == "forked":
    if os.fork() == 0:
        os.setsid()
        time.sleep(20)
        os._exit(0)
print(engine._host._child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["plain", "forked"])
def test_no_orphan_when_the_parent_is_killed(tiny_llama: Path, how: str) -> None:
    """Also where a process forked from the parent keeps the parent's end of the socket open."""
    options = ["-W", "ignore::DeprecationWarning", "-c"]
    parent = subprocess.Popen(
        [sys.executable, *options, _ORPHAN, str(tiny_llama), how], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        parent.wait()
        assert eventually(lambda: not is_running(pid), 5)


def test_ctrl_c_reaches_the_parent_alone(tiny_llama: Path) -> None:
    """SIGINT to the whole process group, as a terminal sends it."""
    code = """
    import os, signal, sys
    from engine import Engine, SamplingParams
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with Engine(sys.argv[1], device="cpu", num_threads=1, placement="process") as engine:
        assert os.getpgid(engine._host._child.pid) != os.getpgid(0)
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        try:
            print("ready", flush=True)
            while True:
                engine.generate(["in the"] * 8, params)
        except KeyboardInterrupt:
            print(len(engine.generate("in the", params).outputs[0].token_ids))
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tiny_llama)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=30)
    assert (out, err, parent.returncode) == ("400\n", "", 0)


# -------------------------------------------------------------------- the end


def test_close_ends_the_child(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    pid = child_pid(engine)
    handle = engine.submit("in the", LONG)
    engine.close()
    assert not is_running(pid)
    assert len(handle.result(timeout=1).outputs[0].token_ids) == 400
    assert engine.stats().requests_finished == 1
    engine.close()


def test_close_ends_a_child_that_does_not_listen(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while another thread waits for the child to take more."""
    monkeypatch.setattr(engine.placement.remote, "_SEND_BUFFER_BYTES", 1 << 16)
    eng = make_engine()
    pid = child_pid(eng)
    os.kill(pid, signal.SIGSTOP)
    prompts = [[5] * 500] * 400  # 800 kB, more than the socket takes
    handles: list[Any] = []
    caller = threading.Thread(target=lambda: handles.extend(eng.submit_many(prompts, SHORT)))
    caller.start()
    assert eventually(lambda: len(eng._host._open) == 400)  # type: ignore[attr-defined]
    caller.join(0.5)
    assert caller.is_alive()
    started_s = time.monotonic()
    eng.close(timeout=0.2)
    assert time.monotonic() - started_s < 5
    assert not is_running(pid)
    caller.join(5)
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result(timeout=1)
    assert len(handles) == 400


def test_an_engine_nobody_holds_ends_its_child(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    pid = child_pid(engine)
    engine.generate("in", SHORT)
    started_s = time.monotonic()
    del engine
    gc.collect()
    assert eventually(lambda: not is_running(pid))
    # It ended by itself: it is killed only after 10 s.
    assert time.monotonic() - started_s < 5
