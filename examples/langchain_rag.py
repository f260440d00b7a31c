"""RAG in one process: embed, retrieve, rerank and answer, with two small models and no server."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore

from llm_connectors.langchain import ChatLocal, LocalEmbeddings, LocalRerank

NOTES = [
    "The last ferry to the island leaves at half past nine in the evening.",
    "The ferry's café sells coffee, soup and sandwiches.",
    "Bicycles travel free of charge on every ferry before noon.",
    "The island's lighthouse was built in 1887 and can be visited on Sundays.",
    "Seals rest on the sandbank south of the harbour at low tide.",
    "The museum shows boats, nets and the history of herring fishing.",
]

# Prompts for queries and documents come from the model where it has some; all notes are one batch.
store = InMemoryVectorStore(LocalEmbeddings(model="all-minilm-l6-v2"))
store.add_texts(NOTES)

# Ranks by cosine, on the engine that is loaded already, and drops what is far off. A cross-encoder
# ranks better: model="cross-encoder/ms-marco-MiniLM-L6-v2". So does a larger chat model, asked
# whether a note is relevant; the one below is too small for that.
rerank = LocalRerank(model="all-minilm-l6-v2", top_n=2, min_score=0.2)
chat = ChatLocal(model="smollm2-135m", temperature=0, max_tokens=32)


def find_notes(question: str) -> dict[str, str]:
    found = store.similarity_search(question, k=4)
    best = rerank.compress_documents(found, question)
    for note in best:
        print(f"  {note.metadata['relevance_score']:.2f}  {note.page_content}")
    return {"question": question, "notes": "\n".join(note.page_content for note in best)}


prompt = ChatPromptTemplate.from_template(
    "Answer with the help of these notes.\n{notes}\n\nQuestion: {question}"
)
chain = RunnableLambda(find_notes) | prompt | chat | StrOutputParser()

for question in ["When does the last boat go?", "What can I eat on board?"]:
    print(question)
    print(" ", chain.invoke(question))
