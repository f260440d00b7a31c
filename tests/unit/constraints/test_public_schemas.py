"""The public JSON-Schema-Test-Suite (draft 2020-12): nothing invalid is ever allowed.

A schema of the suite is either refused at submit, with the JSON path, or enforced: then none of its
invalid instances can be written, all but a few of its valid ones can, and answers drawn at random
are valid for a validator nobody here wrote. `json_schema_suite.json` names the suite's commit and
licence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from constraint_cases import compiler, draw_answer, tokenizer

from engine.constraints.compiler import CompiledConstraint
from engine.errors import ConstraintError
from engine.sampling_params import SamplingParams

_FILE = Path(__file__).parents[2] / "support" / "json_schema_suite.json"
GROUPS: dict[str, list[Any]] = json.loads(_FILE.read_text())["groups"]

# Keywords whose meaning depends on instances that a grammar cannot look at.
BEYOND = {
    *("unevaluatedProperties", "unevaluatedItems", "not", "contains", "minContains"),
    *("maxContains", "propertyNames", "uniqueItems", "dependentRequired", "dependentSchemas"),
    *("if-then-else", "infinite-loop-detection"),
}


def compiled_or_refusal(schema: Any) -> tuple[CompiledConstraint | None, str]:
    params = SamplingParams(json_schema=json.dumps(schema))
    try:
        return compiler("bytes").compile(params), ""
    except ConstraintError as error:
        return None, str(error)


def can_be_written(compiled: CompiledConstraint, value: Any) -> bool:
    tok = tokenizer("bytes")
    ids = tok.encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False)
    answer = [*ids, tok.eos_token_id]
    return bool(compiled._matcher.deep_copy().validate_tokens(answer) == len(answer))


@pytest.mark.parametrize("keyword", GROUPS)
def test_no_invalid_instance_can_be_written(keyword: str) -> None:
    for description, schema, instances in GROUPS[keyword]:
        compiled, refusal = compiled_or_refusal(schema)
        if compiled is None:
            assert "$" in refusal, (description, refusal)
            continue
        for is_valid, value in instances:
            if not is_valid:
                assert not can_be_written(compiled, value), (description, schema, value)


@pytest.mark.parametrize("keyword", GROUPS)
def test_answers_of_enforced_schemas_are_valid(keyword: str) -> None:
    for description, schema, _ in GROUPS[keyword]:
        compiled, _ = compiled_or_refusal(schema)
        if compiled is None or compiled._way is None or r"\p{" in str(schema):
            continue  # the validator's regular expressions, Python's, have no \p{…}
        for seed in range(3):
            answer = draw_answer(compiled, tokenizer("bytes"), len(compiled._way) + 60, seed)
            assert answer.is_complete, description
            validator = jsonschema.Draft202012Validator(schema)
            assert validator.is_valid(json.loads(answer.text)), (schema, answer.text)


def test_most_of_the_suite_is_enforced_and_most_valid_instances_can_be_written() -> None:
    """The figures of docs/CONSTRAINTS.md; they may only grow."""
    num_schemas = num_enforced = num_valid = num_written = num_beyond = 0
    for keyword, groups in GROUPS.items():
        for _, schema, instances in groups:
            compiled, _ = compiled_or_refusal(schema)
            num_schemas += keyword not in BEYOND
            if compiled is None:
                continue
            num_enforced += keyword not in BEYOND
            num_beyond += keyword in BEYOND
            for is_valid, value in instances:
                num_valid += is_valid
                num_written += is_valid and can_be_written(compiled, value)
    assert num_enforced / num_schemas > 0.86, (num_enforced, num_schemas)
    assert num_beyond >= 39
    assert num_written / num_valid > 0.95, (num_written, num_valid)
