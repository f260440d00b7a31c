"""`LLM`: vLLM's class of that name on this engine; snippets written for it run unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.outputs import RequestOutput
from engine.prompts import is_one_prompt
from engine.sampling_params import SamplingParams

_NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "tokenizer_mode": ("auto",),
    "skip_tokenizer_init": (False,),
    "quantization": (None,),
    "swap_space": (0, 4),
    "cpu_offload_gb": (0,),
    "disable_log_stats": (True, False),
    "enable_lora": (False,),
    "enable_chunked_prefill": (True,),
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
}
"""Options of vLLM's class that this engine does not have, with the values under which that makes
no difference. Any other value is refused: nothing is accepted and ignored."""


class LLM:
    """Offline generation with vLLM's calling convention.

    Differences: `generate` reads control tokens in prompts as such (as vLLM does, and unlike
    `Engine.generate`), because code written for vLLM passes chat-formatted text.

    Args:
        model: As in `EngineConfig.model`.
        **options: Fields of `EngineConfig`. vLLM's options without meaning here are accepted with
            the values that change nothing.

    Attributes:
        engine: The engine underneath; for streaming, `submit`, `stats` and so on.

    Raises:
        ConfigError: An unknown option, or one of vLLM's with a value this engine cannot honour.
        EngineError: What `Engine` raises.
    """

    def __init__(self, model: str, **options: Any) -> None:
        for name, allowed in _NEUTRAL_OPTIONS.items():
            if name in EngineConfig.field_names() or name not in options:
                continue
            value = options.pop(name)
            if value not in allowed:
                msg = (
                    f"{name}={value!r} is not available in this engine; only "
                    f"{' or '.join(map(repr, allowed))} is accepted. Leave it out."
                )
                raise ConfigError(msg)
        self.engine = Engine(model, **options)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Answers to the prompts, in order; always a list.

        Args:
            prompts: A string, a list of token ids, a dict with "prompt" or "prompt_token_ids", or
                a list of these.
            sampling_params: For all prompts, or one for each. Default `SamplingParams()`.
            use_tqdm: Show a progress bar.
            priority: Smaller runs sooner.

        Raises:
            EngineError: As `Engine.generate`.
        """
        is_single = isinstance(prompts, Mapping) or is_one_prompt(prompts)
        items = [prompts] if is_single else list(prompts)
        outputs: list[RequestOutput] = self.engine.generate(
            [_prompt_of(item) for item in items],
            sampling_params,
            use_tqdm=use_tqdm,
            priority=priority,
            parse_special=True,
        )
        return outputs

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or to a list of them; always a list.

        Args:
            messages: A list of message dicts, or a list of such lists.
            sampling_params: For all conversations, or one for each.
            use_tqdm: Show a progress bar.
            chat_template: Jinja source to use instead of the model's.
            add_generation_prompt: End with the opening of the assistant's turn. Default: yes,
                unless `continue_final_message` is set.
            continue_final_message: Leave the last message open, to be continued.
            tools: JSON descriptions of tools for the template.
            chat_template_kwargs: Further variables of the template.

        Raises:
            EngineError: As `Engine.chat`.
        """
        outputs = self.engine.chat(
            messages,
            sampling_params,
            use_tqdm=use_tqdm,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        return outputs if isinstance(outputs, list) else [outputs]

    def get_tokenizer(self) -> Any:
        """The engine's tokenizer, with `encode` and `decode`."""
        return self.engine.tokenizer

    def close(self) -> None:
        """Close the engine and give its memory back."""
        self.engine.close()


def _prompt_of(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return item
    known = {"prompt", "prompt_token_ids"}
    if not known & set(item) or set(item) - known:
        msg = f"A prompt dict has 'prompt' or 'prompt_token_ids', got {sorted(item)}."
        raise RequestError(msg)
    return item["prompt_token_ids"] if "prompt_token_ids" in item else item["prompt"]
