"""LangChain classes over the in-process engine."""
