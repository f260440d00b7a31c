"""Questions about a few documents with LlamaIndex, offline: no server, no network, no API key.

Documents are found by keyword (no embedding model is needed), the answers come from the model in
this process, and all questions are answered side by side in one batch.
"""

import re

from llama_index.core.embeddings import MockEmbedding
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llm_connectors.llama_index import LocalLLM, configure_settings, query_many

DOCUMENTS = [
    "The harbour café opens at seven in the morning. Its speciality is cinnamon rolls.",
    "The museum in the old mill is free on Sundays. It shows paintings of the river.",
    "The last ferry to the island leaves at 9:30 in the evening.",
    "The town library lends bicycles. A bicycle costs three euros a day.",
]
QUESTIONS = [
    "What is the speciality of the harbour café?",
    "On which day is the museum free?",
    "When does the last ferry leave?",
    "How much does a bicycle cost?",
]


def words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


class KeywordRetriever(BaseRetriever):
    """The node that shares most words with the question."""

    def __init__(self, nodes: list[TextNode]) -> None:
        self._nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = words(query_bundle.query_str)
        scored = [(len(asked & words(node.text)), node) for node in self._nodes]
        score, node = max(scored, key=lambda pair: pair[0])
        return [NodeWithScore(node=node, score=score)]


with LocalLLM("smollm2-135m", temperature=0.0, max_tokens=48) as llm:
    configure_settings(llm, MockEmbedding(embed_dim=1))
    nodes = [TextNode(text=text) for text in DOCUMENTS]
    engine = RetrieverQueryEngine.from_args(KeywordRetriever(nodes), response_mode="compact")
    for question, answer in zip(QUESTIONS, query_many(engine, QUESTIONS), strict=True):
        print(f"Q: {question}\nA: {answer}\n")
