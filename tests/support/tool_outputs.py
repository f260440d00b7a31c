"""What models write when they call tools, and what is to be read in it.

Each output is in the form that the named source documents or prints: model cards, chat templates,
vendors' prompt format pages, and the outputs recorded in vLLM's tests of its tool parsers
(vllm-project/vllm, tests/tool_parsers, Apache-2.0), values shortened.
"""

# ruff: noqa: E501 - outputs are kept as models write them

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "get_time": {"type": "object", "properties": {"timezone": {"type": "string"}}},
    "register_user": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "address": {"type": "object"},
            "role": {"type": ["string", "null"]},
            "aliases": {"type": "array"},
        },
    },
}


@dataclass(frozen=True)
class Recorded:
    """One answer of a model.

    Attributes:
        name: Of the case.
        source: Where the form is documented.
        parser: Name of the tool parser.
        output: What the model wrote.
        calls: Names and arguments of the calls that can be made, in order.
        text: What is for the reader.
        reasoning: What the model thought.
        num_broken: Calls that cannot be read.
    """

    name: str
    source: str
    parser: str
    output: str
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    num_broken: int = 0


_WEATHER = ("get_weather", {"city": "Tokyo"})
_TIME = ("get_time", {"timezone": "Asia/Tokyo"})
_QWEN = "chat template of Qwen/Qwen3-32B"
_VLLM = "vllm tests/tool_parsers"

RECORDED = [
    # ------------------------------------------------------------ hermes
    Recorded("one", _QWEN, "hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tokyo"}}\n</tool_call>', [_WEATHER]),
    Recorded("text and two", _QWEN, "hermes", 'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tokyo"}}\n</tool_call>\n<tool_call>\n{"name": "get_time", "arguments": {"timezone": "Asia/Tokyo"}}\n</tool_call>', [_WEATHER, _TIME], "Let me look."),
    Recorded("text between", f"{_VLLM}/test_granite4_tool_parser.py", "hermes", 'First: <tool_call> {"name": "get_weather", "arguments": "{\\"city\\": \\"Tokyo\\"}"} </tool_call> then <tool_call> {"name": "get_time", "arguments": {}} </tool_call> See?', [_WEATHER, ("get_time", {})], "First:  then  See?"),
    Recorded("arguments first", "ibm-granite/granite-4.0-h-tiny", "hermes", '<tool_call>{"arguments": {"city": "Tokyo", "name": "x"}, "name": "get_weather"}</tool_call>', [("get_weather", {"city": "Tokyo", "name": "x"})]),
    Recorded("no end tag", f"{_VLLM}/test_hermes_tool_parser.py", "hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tokyo"}}', [_WEATHER]),
    Recorded("brace missing", f"{_VLLM}/test_hermes_tool_parser.py", "hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tokyo"}\n</tool_call> Done.', [], "Done.", num_broken=1),
    Recorded("bare string", f"{_VLLM}/test_hermes_tool_parser.py", "hermes", '<tool_call>\n{"name": "get_weather", "arguments": "hello"}\n</tool_call>', num_broken=1),
    Recorded("quote missing", "a truncated answer of Qwen2.5-0.5B-Instruct's form", "hermes", 'Hm <tool_call>{"name": "get_weather", "arguments": {"city": "Tok}}</tool_call> ok', [], "Hm  ok", num_broken=1),
    Recorded("tag in a string", _QWEN, "hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call> \\" 日本"}}</tool_call>', [("get_weather", {"city": '</tool_call> " 日本'})]),
    Recorded("almost a tag", _QWEN, "hermes", "a < b, <tool> and <tool_calls are text \n", [], "a < b, <tool> and <tool_calls are text \n"),
    Recorded("no call", _QWEN, "hermes", "  Nothing to do.\n", [], "  Nothing to do.\n"),
    Recorded("list in a tag", "HuggingFaceTB/SmolLM2-1.7B-Instruct model card", "hermes", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Tokyo"}}, {"name": "get_time", "arguments": {"timezone": "Asia/Tokyo"}}]</tool_call>', [_WEATHER, _TIME]),
    Recorded("no arguments", _QWEN, "hermes", '<tool_call>\n{"name": "get_time"}\n</tool_call>', [("get_time", {})]),
    Recorded("nonsense in a tag", _QWEN, "hermes", "<tool_call>get_weather Tokyo</tool_call>", num_broken=1),
    # ------------------------------------------------------------ llama3_json
    Recorded("one", "Meta, Llama 3.1 prompt format", "llama3_json", '{"name": "get_weather", "parameters": {"city": "Tokyo"}}', [_WEATHER]),
    Recorded("python tag", "Meta, Llama 3.1 prompt format", "llama3_json", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Tokyo"}}', [_WEATHER]),
    Recorded("semicolons", f"{_VLLM}/test_llama3_json_tool_parser.py", "llama3_json", '{"name": "get_weather", "parameters": {"city": "Tokyo"}} ; {"name": "get_time", "parameters": {"timezone": "Asia/Tokyo"}}', [_WEATHER, _TIME]),
    Recorded("in a sentence", f"{_VLLM}/test_llama3_json_tool_parser.py", "llama3_json", 'Here is the result: {"name": "get_time", "parameters": {}} I used {get_time} and {"query": "test"}', [("get_time", {})], 'Here is the result:  I used {get_time} and {"query": "test"}'),
    Recorded("unknown name", f"{_VLLM}/test_llama3_json_tool_parser.py", "llama3_json", '{"name": "Ada", "parameters": {}}', [], '{"name": "Ada", "parameters": {}}'),
    Recorded("no parameters", f"{_VLLM}/test_llama3_json_tool_parser.py", "llama3_json", '{"name": "get_time"}', [], '{"name": "get_time"}'),
    Recorded("brackets in strings", f"{_VLLM}/test_llama3_json_tool_parser.py", "llama3_json", '{"name": "get_weather", "parameters": {"city": "test {value} [complex]", "nested": {"inner": "He said \\"{x}\\""}}}', [("get_weather", {"city": "test {value} [complex]", "nested": {"inner": 'He said "{x}"'}})]),
    Recorded("cut off", f"{_VLLM}/test_llama3_json_tool_parser.py", "llama3_json", '{"name": "get_weather", "parameters": {"city": "To', num_broken=1),
    # ------------------------------------------------------------ generic JSON
    Recorded("fence", "as small models answer a described format", "json", 'Sure:\n```json\n{"name": "get_weather", "arguments": {"city": "Tokyo"}}\n```\nDone.', [_WEATHER], "Sure:\n\nDone."),
    Recorded("list", "as small models answer a described format", "json", '[{"name": "get_weather", "arguments": {"city": "Tokyo"}}, {"name": "get_time", "arguments": {"timezone": "Asia/Tokyo"}}]', [_WEATHER, _TIME]),
    Recorded("OpenAI's form", "OpenAI API reference, tool_calls", "json", '{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\\"city\\": \\"Tokyo\\"}"}}', [_WEATHER]),
    Recorded("other JSON", "as any model answers", "json", 'The record is {"id": 7, "tags": ["a", {"name": "b"}]}, see [1].', [], 'The record is {"id": 7, "tags": ["a", {"name": "b"}]}, see [1].'),
    Recorded("other fence", "as any model answers", "json", "```python\nprint({'a': [1]})\n```", [], "```python\nprint({'a': [1]})\n```"),
    # ------------------------------------------------------------ pythonic
    Recorded("one", "Meta, Llama 3.2 prompt format", "pythonic", "[get_weather(city='Tokyo', days=3)]", [("get_weather", {"city": "Tokyo", "days": 3})]),
    Recorded("two", f"{_VLLM}/test_pythonic_tool_parser.py", "pythonic", "[get_weather(city='Martha\\'s \"Vineyard\")'), register_user(name='John Doe', age=37, address={'city': 'San Francisco'}, role=None, aliases=['John', 'J'])]", [("get_weather", {"city": 'Martha\'s "Vineyard")'}), ("register_user", {"name": "John Doe", "age": 37, "address": {"city": "San Francisco"}, "role": None, "aliases": ["John", "J"]})]),
    Recorded("line break in a string", "as small models write", "pythonic", "[get_weather(city='To\nkyo', days=-3)]", [("get_weather", {"city": "To\nkyo", "days": -3})]),
    Recorded("tags", "chat template of meta-llama/Llama-4-Scout-17B-16E-Instruct", "pythonic", "<|python_start|>[get_time()]<|python_end|>", [("get_time", {})]),
    Recorded("tool_code", "Google, function calling with Gemma", "pythonic", '```tool_code\nget_weather(city="Tokyo")\n```', [_WEATHER]),
    Recorded("bad neighbour", f"{_VLLM}/test_pythonic_tool_parser.py", "pythonic", "[get_time(x=b'z'), get_weather(city='Tokyo')]", [_WEATHER], num_broken=1),
    Recorded("infinite number", f"{_VLLM}/test_pythonic_tool_parser.py", "pythonic", "[get_time(x=1e999), get_weather(city='Tokyo')]", [_WEATHER], num_broken=1),
    Recorded("mismatched", f"{_VLLM}/test_pythonic_tool_parser.py", "pythonic", "[get_time(x=1])]", num_broken=1),
    Recorded("lists are text", "as any model answers", "pythonic", "See [1] and [call(x)] or [get_weather].", [], "See [1] and [call(x)] or [get_weather]."),
    # ------------------------------------------------------------ mistral
    Recorded("list", "chat template of mistralai/Mistral-7B-Instruct-v0.3", "mistral", 'Hello[TOOL_CALLS] [{"name": "get_weather", "arguments":{"city": "Tokyo"}}, {"arguments":{"timezone": "Asia/Tokyo"}, "name": "get_time", "id": "abcdefghi"}]', [_WEATHER, _TIME], "Hello"),
    Recorded("names", f"{_VLLM}/test_mistral_tool_parser.py (v11)", "mistral", '[TOOL_CALLS]get_weather{"city": "Tokyo"}[TOOL_CALLS]get_time{"timezone": "Asia/Tokyo"}', [_WEATHER, _TIME]),
    Recorded("ids", "mistral-common, instruct tokenizer v13", "mistral", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Tokyo"}', [_WEATHER]),
    Recorded("broken, then good", f"{_VLLM}/test_mistral_tool_parser.py (wrong_json)", "mistral", '[TOOL_CALLS]get_time{"a": 1][TOOL_CALLS]get_weather{"city": "Tokyo"}', [_WEATHER], num_broken=1),
    Recorded("no JSON", f"{_VLLM}/test_mistral_tool_parser.py", "mistral", "[TOOL_CALLS] not json at all", num_broken=1),
    # ------------------------------------------------------------ granite
    Recorded("token", f"{_VLLM}/test_granite_tool_parser.py (3.0)", "granite", '<|tool_call|> [\n  {"name": "get_weather", "arguments": {"city": "Tokyo"}},\n  {"arguments": {"timezone": "Asia/Tokyo"}, "name": "get_time"}\n]', [_WEATHER, _TIME]),
    Recorded("spelled", f"{_VLLM}/test_granite_tool_parser.py (3.1)", "granite", 'I look.\n<tool_call>[{"name": "get_weather", "arguments": {"city": "Tokyo"}}]\nWait {please}.', [_WEATHER], "I look.\n\nWait {please}."),
    Recorded("cut off", f"{_VLLM}/test_granite_tool_parser.py", "granite", '<|tool_call|> [{"name": "get_time", "arguments": {', num_broken=1),
    # ------------------------------------------------------------ phi4
    Recorded("tags", "chat template of microsoft/Phi-4-mini-instruct", "phi4", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Tokyo"}}]<|/tool_call|>', [_WEATHER]),
    Recorded("functools", f"{_VLLM}/test_phi4mini_tool_parser.py", "phi4", 'Let me check.\nfunctools[\n  {"name": "get_weather", "arguments": {"city": "Tokyo"}},\n  {"name": "get_time", "arguments": {"timezone": "Asia/Tokyo"}}\n]\nMore?', [_WEATHER, _TIME], "Let me check.\n\nMore?"),
    Recorded("the module", "as any model answers", "phi4", "Python's functools has lru_cache.", [], "Python's functools has lru_cache."),
    # ------------------------------------------------------------ gemma
    Recorded("functiongemma", f"{_VLLM}/test_functiongemma_tool_parser.py", "gemma", "Let me look. <start_function_call>call:get_weather{city:<escape>Tokyo<escape>,days:3}<end_function_call><start_function_call>call:get_time{}<end_function_call>", [("get_weather", {"city": "Tokyo", "days": 3}), ("get_time", {})], "Let me look."),
    Recorded("gemma 4", f"{_VLLM}/test_gemma4_tool_parser.py", "gemma", '<|tool_call>call:register_user{name:<|"|>a, {b}<|"|>,address:{<|"|>3<|"|>:<|"|>x<|"|>},aliases:[<|"|>a]<|"|>,1,2.5,true,null],role:null}<tool_call|>', [("register_user", {"name": "a, {b}", "address": {"3": "x"}, "aliases": ["a]", 1, 2.5, True, None], "role": None})]),
    Recorded("cut off", f"{_VLLM}/test_gemma4_tool_parser.py", "gemma", '<|tool_call>call:get_weather{city:<|"|>Lon', num_broken=1),
    Recorded("comma missing", f"{_VLLM}/test_functiongemma_tool_parser.py", "gemma", "<start_function_call>call:get_weather{city:<escape>NYC<escape>unit:<escape>celsius<escape>}<end_function_call>", [("get_weather", {"city": "NYC", "unit": "celsius"})]),
    # ------------------------------------------------------------ deepseek
    Recorded("v3", f"{_VLLM}/test_deepseekv3_tool_parser.py", "deepseek", 'I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Tokyo"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n{"timezone": "Asia/Tokyo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [_WEATHER, _TIME], "I look."),
    Recorded("v3.1", f"{_VLLM}/test_deepseekv31_tool_parser.py", "deepseek", 'x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Tokyo"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{"timezone": "Asia/Tokyo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜> y', [_WEATHER, _TIME], "x y"),
    Recorded("markers missing", f"{_VLLM}/test_deepseekv31_tool_parser.py", "deepseek", '<｜tool▁calls▁begin｜>foo<｜tool▁sep｜>{"x":1}<｜tool▁calls▁end｜>', num_broken=1),
    Recorded("malformed", f"{_VLLM}/test_deepseekv3_tool_parser.py", "deepseek", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Tokyo"\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', num_broken=1),
    # ------------------------------------------------------------ qwen_xml
    Recorded("one", "chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen_xml", "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nTokyo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", [("get_weather", {"city": "Tokyo", "days": 3})], "I look."),
    Recorded("types", "chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen_xml", '<tool_call>\n<function=register_user>\n<parameter=name>\n42\n</parameter>\n<parameter=address>\n{"city": "X"}\n</parameter>\n<parameter=role>\nnull\n</parameter>\n</function>\n</tool_call>', [("register_user", {"name": "42", "address": {"city": "X"}, "role": None})]),
    Recorded("cut off", "chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen_xml", "<tool_call>\n<function=get_weather>\n<parameter=city>\nTok", num_broken=1),
    # ------------------------------------------------------------ harmony
    Recorded("call", "OpenAI cookbook, harmony response format", "harmony", '<|channel|>analysis<|message|>Need to use function get_weather.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Tokyo"}<|call|>', [_WEATHER], "", "Need to use function get_weather."),
    Recorded("answer", "OpenAI cookbook, harmony response format", "harmony", '<|channel|>analysis<|message|>User asks: "What is 2 + 2?" Simple < arithmetic.<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>', [], "2 + 2 = 4.", 'User asks: "What is 2 + 2?" Simple < arithmetic.'),
    Recorded("preamble", "OpenAI cookbook, harmony response format", "harmony", '<|channel|>commentary<|message|>**Plan**: look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_time<|message|>{}<|call|>', [("get_time", {})], "**Plan**: look."),
    Recorded("glued json", "ggml-org/llama.cpp#15158", "harmony", '<|start|>assistant<|channel|>commentary to=functions.get_timejson<|message|>{"timezone": "Asia/Tokyo"}<|call|>', [_TIME]),
    Recorded("recipient first", f"{_VLLM}/test_openai_tool_parser.py", "harmony", " to=functions.get_time<|channel|>commentary json<|message|>{}<|call|>", [("get_time", {})]),
    Recorded("no JSON", f"{_VLLM}/test_openai_tool_parser.py", "harmony", "<|channel|>commentary to=functions.get_time<|message|>foo<|call|>", num_broken=1),
    Recorded("empty", f"{_VLLM}/test_openai_tool_parser.py", "harmony", "<|channel|>commentary to=functions.get_time json<|message|><|call|>", [("get_time", {})]),
]  # fmt: skip
