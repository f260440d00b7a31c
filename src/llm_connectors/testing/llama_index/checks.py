"""All checks by name, in the order of the list they come from."""

from __future__ import annotations

from collections.abc import Callable

from llm_connectors.testing.llama_index import (
    answers,
    calls,
    lifetime,
    pipelines,
    records,
    requests,
)
from llm_connectors.testing.llama_index.subject import Subject

CHECKS: dict[str, Callable[[Subject], None]] = {
    function.__name__.removeprefix("check_"): function
    for function in (
        answers.check_01_identity,
        answers.check_02_types,
        answers.check_03_streams_equal_answers,
        answers.check_04_one_final_chunk,
        answers.check_05_whole_characters,
        answers.check_06_stop_strings,
        answers.check_07_call_options,
        answers.check_08_prompt_tokens,
        answers.check_09_system_prompt,
        answers.check_10_metadata,
        pipelines.check_11_overflow,
        requests.check_12_gathered,
        requests.check_13_any_loop,
        requests.check_14_sync_in_a_loop,
        requests.check_15_giving_up,
        requests.check_16_batch_equals_single,
        calls.check_17_tools,
        calls.check_18_streamed_objects,
        calls.check_19_structured,
        calls.check_20_agents,
        records.check_21_usage,
        records.check_22_events,
        records.check_23_logprobs,
        records.check_24_blocks,
        lifetime.check_25_copies,
        pipelines.check_26_embeddings,
        pipelines.check_27_rag_offline,
        lifetime.check_28_close,
    )
}
