"""LangChain and LlamaIndex classes over the in-process engine of package `engine`."""
