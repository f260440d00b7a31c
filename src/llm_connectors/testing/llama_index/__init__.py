"""28 checks that a LlamaIndex LLM should pass, for any class.

From a shell, with a function that makes the model::

    pytest --pyargs llm_connectors.testing.llama_index -p llm_connectors.testing.llama_index.plugin
        --llm-factory my_package.my_module:make_llm

From a test of your own::

    from llm_connectors.testing.llama_index import CHECKS, Subject

    @pytest.mark.parametrize("name", CHECKS)
    def test_my_llm(name):
        CHECKS[name](Subject(make_llm()))

The factory gives an LLM, or a `Subject` with probes that show what its engine does. A check without
the probe it needs is skipped with a reason. The checks need pytest, which users of this package do
not; nothing else imports it.
"""

from __future__ import annotations

from llm_connectors.testing.llama_index.checks import CHECKS
from llm_connectors.testing.llama_index.subject import Subject

__all__ = ["CHECKS", "Subject"]
