"""Titles, summaries, keywords and questions for the standard library's documentation.

Four extractors run together, so the engine always has a full batch, and with a shared prefix, so
that it reads each text once.
"""

import abc
import bisect
import calendar
import colorsys
import csv
import inspect
import shlex

from llama_index.core import Document
from llama_index.core.extractors import (
    KeywordExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
    TitleExtractor,
)
from llama_index.core.ingestion import IngestionPipeline

from llm_connectors.llama_index import (
    ExtractorGroup,
    LocalLLM,
    batched,
    offline_sentence_splitter,
    with_shared_prefix,
)

MODULES = (abc, bisect, calendar, colorsys, csv, shlex)
documents = [
    Document(text=inspect.getdoc(module)[:800], metadata={"module": module.__name__})
    for module in MODULES
    if inspect.getdoc(module)
]
with LocalLLM("smollm2-135m", temperature=0.0, max_tokens=24) as llm:
    kinds = (TitleExtractor, SummaryExtractor, KeywordExtractor, QuestionsAnsweredExtractor)
    extractors = [kind(llm=llm, show_progress=False) for kind in kinds]
    group = ExtractorGroup(extractors=with_shared_prefix(batched(extractors)), show_progress=False)
    pipeline = IngestionPipeline(transformations=[offline_sentence_splitter(llm), group])
    for node in pipeline.run(documents=documents):
        print(node.metadata["module"])
        print("  title:   ", node.metadata["document_title"].strip()[:70])
        print("  keywords:", node.metadata["excerpt_keywords"].strip()[:70])
    stats = llm.engine.stats()
    print(f"{stats.peak_running} requests at once, prefix hits {stats.prefix_hit_rate:.0%}")
