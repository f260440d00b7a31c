"""The wheel has what it should, and works with either framework absent."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_RUN = """
import importlib.abc, sys
wheel, folder, blocked = sys.argv[1], sys.argv[2], set(sys.argv[3:])

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Blocked())
# The editable install of the checkout must not be what is tested.
sys.path[:] = [wheel, *(entry for entry in sys.path if not entry.endswith("/src"))]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import engine
assert engine.__file__.startswith(wheel), engine.__file__
from engine import Engine, SamplingParams
with Engine(folder, device="cpu", num_threads=1) as eng:
    output = eng.generate("in the", SamplingParams(max_tokens=3, ignore_eos=True))
    print(len(output.outputs[0].token_ids))
    for framework, module, name in (
        ("langchain_core", "llm_connectors.langchain", "ChatLocal"),
        ("llama_index", "llm_connectors.llama_index", "LocalLLM"),
    ):
        try:
            kind = getattr(__import__(module, fromlist=["_"]), name)
        except ImportError as error:
            assert framework in blocked
            assert "pip install llm-connectors[" in str(error), str(error)
            print("needs", framework)
        else:
            llm = kind(model=folder, engine=eng, max_tokens=3)
            answer = llm.invoke("in") if name == "ChatLocal" else llm.complete("in")
            print("works", framework, type(answer).__name__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_both_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"engine", "llm_connectors"}
    assert "engine/py.typed" in names
    assert "llm_connectors/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.parametrize(
    "blocked", [[], ["langchain_core"], ["llama_index"], ["langchain_core", "llama_index"]]
)
def test_the_wheel_works_with_frameworks_absent(
    wheel: Path, tiny_llama: Path, tmp_path: Path, blocked: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(wheel), str(tiny_llama), *blocked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split("\n")
    assert found[0] == "3"
    for framework in ("langchain_core", "llama_index"):
        verb = "needs" if framework in blocked else "works"
        assert any(line.startswith(f"{verb} {framework}") for line in found), found
