"""Questions about a few documents, answered with citations: two small models, no server, no key.

Notes are found by their vectors, the answers come from the model in this process, and all questions
are answered side by side in one batch.
"""

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import CitationQueryEngine

from llm_connectors.llama_index import LocalLLM, configure_settings, query_many

NOTES = {
    "café": "The harbour café opens at seven in the morning. Its speciality is cinnamon rolls.",
    "museum": "The museum in the old mill is free on Sundays. It shows paintings of the river.",
    "ferry": "The last ferry to the island leaves at 9:30 in the evening.",
    "library": "The town library lends bicycles. A bicycle costs three euros a day.",
}
QUESTIONS = [
    "What is the speciality of the harbour café?",
    "On which day is the museum free?",
    "When does the last ferry leave?",
    "How much does a bicycle cost?",
]

# The stock template cites in the text, which takes a larger model than this one.
TEMPLATE = PromptTemplate("{context_str}\n\nUse the source above. {query_str}")

with LocalLLM("smollm2-135m", temperature=0.0, max_tokens=48) as llm:
    configure_settings(llm, "all-minilm-l6-v2")
    index = VectorStoreIndex.from_documents(
        [Document(text=text, metadata={"note": name}) for name, text in NOTES.items()]
    )
    engine = CitationQueryEngine.from_args(index, similarity_top_k=1, citation_qa_template=TEMPLATE)
    for question, answer in zip(QUESTIONS, query_many(engine, QUESTIONS), strict=True):
        print(f"Q: {question}\nA: {answer}")
        for number, source in enumerate(answer.source_nodes, 1):
            print(f"   [{number}] note on the {source.node.metadata['note']}")
