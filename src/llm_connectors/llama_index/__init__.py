"""LlamaIndex classes over the in-process engine."""
