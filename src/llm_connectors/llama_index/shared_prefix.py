"""Prompts of extractors that begin alike, so that the engine reads each text once.

LlamaIndex's extractors put a node's text behind or between words of their own, and behind the
metadata that earlier extractors found, so no two of their prompts about a node begin alike. With
these templates they all do::

    │ chat markup, one fixed line │ the node's text │ the task │ answer
    └── shared by all requests ───┘                 │
    └── shared by all requests about one node ──────┘

The engine finds the shared part in its prefix cache: of k extractors, all but the first read only
their task. That needs the KV cache to hold the nodes' texts from one extractor to the next, or the
extractors to run together (`ExtractorGroup`).
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from llama_index.core import extractors as core
from llama_index.core.extractors import metadata_extractors as originals
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import MetadataMode

from llm_connectors.llama_index.errors import RequestError
from llm_connectors.llama_index.extractors import ExtractorGroup

T = TypeVar("T")

EXCERPT_HEAD = (
    "Read this excerpt of a document and do the task below it.\n\nExcerpt:\n{context_str}\n\n"
)
"""What each prompt about a node begins with."""

TITLE_NODE_TEMPLATE = (
    EXCERPT_HEAD + "Task: Write one title that covers what the excerpt is about.\nTitle: "
)
TITLE_COMBINE_TEMPLATE = (
    "These titles were proposed for parts of one document. Write one title for the whole document."
    "\n\nProposed: {context_str}\n\nTitle: "
)
KEYWORD_TEMPLATE = (
    EXCERPT_HEAD + "Task: Give {keywords} keywords that tell this excerpt from others, separated "
    "by commas.\nKeywords: "
)
QUESTIONS_TEMPLATE = (
    EXCERPT_HEAD + "Task: Write {num_questions} questions that this excerpt answers and other "
    "texts probably do not, one per line.\nQuestions: "
)
SUMMARY_TEMPLATE = (
    EXCERPT_HEAD + "Task: Summarize the main topics and names of the excerpt.\nSummary: "
)

_CHANGES: dict[type[core.BaseExtractor], dict[str, tuple[str, str]]] = {
    core.TitleExtractor: {
        "node_template": (originals.DEFAULT_TITLE_NODE_TEMPLATE, TITLE_NODE_TEMPLATE),
        "combine_template": (originals.DEFAULT_TITLE_COMBINE_TEMPLATE, TITLE_COMBINE_TEMPLATE),
    },
    core.KeywordExtractor: {
        "prompt_template": (originals.DEFAULT_KEYWORD_EXTRACT_TEMPLATE, KEYWORD_TEMPLATE)
    },
    core.QuestionsAnsweredExtractor: {
        "prompt_template": (originals.DEFAULT_QUESTION_GEN_TMPL, QUESTIONS_TEMPLATE)
    },
    core.SummaryExtractor: {
        "prompt_template": (originals.DEFAULT_SUMMARY_EXTRACT_TEMPLATE, SUMMARY_TEMPLATE)
    },
}
"""Extractor class -> field -> (LlamaIndex's template, ours)."""


def with_shared_prefix(component: T) -> T:
    """A copy of `component` whose prompts begin with the node's text alone.

    Templates that the user has set are kept. The extractors then read a node's text without its
    metadata, unless another `metadata_mode` than the default was set.

    Args:
        component: A title, keyword, question or summary extractor, an `ExtractorGroup`, an
            `IngestionPipeline` or a list. Of the last three, other parts are kept as they are.

    Raises:
        RequestError: The component is none of these.
    """
    changed = _changed(component)
    if changed is None:
        msg = (
            f"{type(component).__name__} has no prompt about a node. with_shared_prefix() takes "
            "TitleExtractor, KeywordExtractor, QuestionsAnsweredExtractor, SummaryExtractor, "
            "ExtractorGroup, IngestionPipeline, and lists of them."
        )
        raise RequestError(msg)
    return cast("T", changed)


def _changed(component: Any) -> Any | None:
    if isinstance(component, list | tuple):
        return type(component)([_changed(part) or part for part in component])
    if isinstance(component, IngestionPipeline):
        parts = _changed(component.transformations)
        return component.model_copy(update={"transformations": parts})
    if isinstance(component, ExtractorGroup):
        return component.model_copy(update={"extractors": _changed(component.extractors)})
    for cls, templates in _CHANGES.items():
        if isinstance(component, cls):
            update: dict[str, Any] = {
                name: ours
                for name, (original, ours) in templates.items()
                if getattr(component, name) == original
            }
            if component.metadata_mode == MetadataMode.ALL:
                update["metadata_mode"] = MetadataMode.NONE
            return component.model_copy(update=update)
    return None
