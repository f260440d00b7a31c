"""Does a request fit at all? Decided at submit, before it can wait in vain."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import CapacityError, ContextOverflowError, RequestError


@dataclass(slots=True, frozen=True)
class CapacityLimits:
    """What one sequence may take at most. Pure and immutable: any thread may ask.

    Attributes:
        max_model_len: Tokens of prompt and answer together.
        block_size: Tokens per KV block.
        num_usable_blocks: KV blocks that one sequence alone could have.
    """

    max_model_len: int
    block_size: int
    num_usable_blocks: int

    @property
    def max_cached_total_tokens(self) -> int:
        """Longest sequence the KV cache holds; a sequence's last token needs no KV."""
        return self.num_usable_blocks * self.block_size + 1

    def check_fits(self, num_prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Total tokens the sequence may reach.

        Args:
            num_prompt_tokens: Length of the prompt, >= 1.
            max_new_tokens: New tokens asked for, >= 1; None for as many as the context and the KV
                cache hold.

        Raises:
            RequestError: The prompt is empty, or no new token is asked for.
            ContextOverflowError: Prompt and new tokens exceed `max_model_len`.
            CapacityError: They would not fit into the KV cache even with no other request.
        """
        if num_prompt_tokens < 1:
            msg = f"The prompt has {num_prompt_tokens} tokens; at least 1 is needed."
            raise RequestError(msg)
        if max_new_tokens is not None and max_new_tokens < 1:
            msg = f"max_tokens={max_new_tokens} must be >= 1."
            raise RequestError(msg)
        wanted = num_prompt_tokens + (1 if max_new_tokens is None else max_new_tokens)
        if wanted > self.max_model_len:
            raise ContextOverflowError(self._overflow(num_prompt_tokens, max_new_tokens))
        if wanted > self.max_cached_total_tokens:
            raise CapacityError(self._too_few_blocks(num_prompt_tokens, wanted))
        if max_new_tokens is None:
            return min(self.max_model_len, self.max_cached_total_tokens)
        return wanted

    def _overflow(self, num_prompt_tokens: int, max_new_tokens: int | None) -> str:
        room = self.max_model_len - num_prompt_tokens
        if room < 1:
            return (
                f"The prompt has {num_prompt_tokens} tokens and leaves no room for an answer: "
                f"max_model_len={self.max_model_len}. Shorten the prompt by at least "
                f"{1 - room} tokens, or raise max_model_len as far as the model allows."
            )
        return (
            f"The prompt has {num_prompt_tokens} tokens, and with max_tokens={max_new_tokens} "
            f"that makes {num_prompt_tokens + (max_new_tokens or 1)}, more than "
            f"max_model_len={self.max_model_len}. Lower max_tokens to at most {room}, or "
            "shorten the prompt."
        )

    def _too_few_blocks(self, num_prompt_tokens: int, num_total_tokens: int) -> str:
        num_blocks = -(-(num_total_tokens - 1) // self.block_size)
        return (
            f"The prompt has {num_prompt_tokens} tokens and may grow to {num_total_tokens}, which "
            f"takes {num_blocks} KV blocks of {self.block_size} tokens; the KV cache has "
            f"{self.num_usable_blocks} ({self.max_cached_total_tokens - 1} tokens). Shorten the "
            "prompt, lower max_tokens, or give the KV cache more memory "
            "(gpu_memory_utilization, kv_cache_memory_bytes)."
        )
