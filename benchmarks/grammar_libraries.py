"""Grammar libraries side by side on a folder of schemas with instances, such as MaskBench's data.

    python benchmarks/grammar_libraries.py FOLDER [--limit 400]

FOLDER has JSON files with `schema` and `tests` (`data`, `valid`), such as `maskbench/data` of
guidance-ai/jsonschemabench. Each library compiles each schema for the demo model's tokenizer and
follows each instance, written as `json.dumps` writes it, token by token: "compiled" are schemas
that it takes, "valid taken" the valid instances that it lets pass, "invalid refused" the invalid
ones that it does not. Times are of one thread. XGrammar is measured where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.constraints.compiler import ConstraintCompiler
from engine.errors import ConstraintError
from engine.loader.resolve import resolve_model
from engine.sampling_params import SamplingParams
from engine.text.gguf_tokenizer import parts_from_gguf_metadata
from engine.text.tokenizer import Tokenizer

EOS_TOKEN_ID = 2

Step = Callable[[int], bool]
"""Makes the mask, then says whether it allows a token, and takes it."""


class Ours:
    """llguidance as the engine uses it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, [EOS_TOKEN_ID])
        self._compiler.compile(SamplingParams(regex="a"))  # the vocabulary is made once

    def compile(self, schema: Any) -> Any:
        """A compiled schema, or None."""
        try:
            return self._compiler.compile(SamplingParams(json_schema=json.dumps(schema)))
        except ConstraintError:
            return None

    def start(self, compiled: Any) -> tuple[Callable[[], Any], Step]:
        """(make the mask, take a token) of one answer."""
        matcher = compiled._matcher.deep_copy()

        def mask() -> Any:
            return matcher.compute_bitmask()

        def step(token_id: int) -> bool:
            words = np.frombuffer(mask(), np.int32)
            if not words[token_id >> 5] >> (token_id & 31) & 1:
                return False
            return token_id == EOS_TOKEN_ID or bool(matcher.consume_token(token_id))

        return mask, step


class XGrammar:
    """XGrammar with the same layout of white space."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import xgrammar

        self._library = xgrammar
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        info = xgrammar.TokenizerInfo(
            pieces, vocab_size=tokenizer.vocab_size, stop_token_ids=[EOS_TOKEN_ID]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._bitmask = xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)
        self._words = self._bitmask.numpy()[0]

    def compile(self, schema: Any) -> Any:
        """A compiled schema, or None."""
        try:
            return self._compiler.compile_json_schema(
                json.dumps(schema),
                any_whitespace=False,
                separators=(", ", ": "),
                strict_mode=False,
            )
        except (RuntimeError, ValueError):
            return None

    def start(self, compiled: Any) -> tuple[Callable[[], Any], Step]:
        """(make the mask, take a token) of one answer."""
        matcher = self._library.GrammarMatcher(compiled)

        def mask() -> Any:
            if not matcher.fill_next_token_bitmask(self._bitmask):
                self._words.fill(-1)

        def step(token_id: int) -> bool:
            mask()
            if not self._words[token_id >> 5] >> (token_id & 31) & 1:
                return False
            return token_id == EOS_TOKEN_ID or bool(matcher.accept_token(token_id))

        return mask, step


def measure(library: Any, files: list[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    """All figures of one library."""
    compile_s: list[float] = []
    mask_s: list[float] = []
    counts = dict.fromkeys(("compiled", "valid", "valid taken", "invalid", "invalid refused"), 0)
    for file in files:
        case = json.loads(file.read_text())
        started_s = time.perf_counter()
        compiled = library.compile(case["schema"])
        if compiled is None:
            continue
        compile_s.append(time.perf_counter() - started_s)
        counts["compiled"] += 1
        for text, is_valid in instances(case):
            ids = tokenizer.encode(text, add_special_tokens=False)
            step = library.start(compiled)[1]
            is_taken = True
            for token_id in [*ids, EOS_TOKEN_ID]:
                started_s = time.perf_counter()
                is_taken = step(token_id)
                mask_s.append(time.perf_counter() - started_s)
                if not is_taken:
                    break
            counts["valid" if is_valid else "invalid"] += 1
            counts["valid taken"] += is_valid and is_taken
            counts["invalid refused"] += not is_valid and not is_taken
    mask_s.sort()
    return {
        **counts,
        "compile, median ms": 1e3 * statistics.median(compile_s),
        "compile, mean ms": 1e3 * statistics.fmean(compile_s),
        "compile, worst ms": 1e3 * max(compile_s),
        "token, median µs": 1e6 * mask_s[len(mask_s) // 2],
        "token, mean µs": 1e6 * statistics.fmean(mask_s),
        "token, 99 % µs": 1e6 * mask_s[int(0.99 * len(mask_s))],
        "token, worst ms": 1e3 * mask_s[-1],
    }


def instances(case: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """The texts of a file and whether they are valid."""
    for test in case["tests"]:
        yield json.dumps(test["data"], ensure_ascii=False), bool(test["valid"])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=400)
    options = parser.parse_args()
    files = sorted(options.folder.rglob("*.json"))
    files = random.Random(0).sample(files, min(options.limit, len(files)))
    found = resolve_model("smollm2-135m", local_files_only=True).gguf
    assert found is not None, "the demo model is a GGUF file"
    tokenizer = Tokenizer(parts_from_gguf_metadata(found.metadata))
    print(f"{len(files)} schemas, {tokenizer.vocab_size} tokens")
    libraries: list[Any] = [Ours(tokenizer)]
    if importlib.util.find_spec("xgrammar"):
        libraries.append(XGrammar(tokenizer))
    for library in libraries:
        print(type(library).__name__, flush=True)
        for name, value in measure(library, files, tokenizer).items():
            print(f"  {name}: {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
