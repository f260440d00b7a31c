"""An in-process LLM engine: continuous batching, paged KV cache, Triton attention."""
