"""Engines beside the application's own transformers models: neither disturbs the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from other_models import other_model
from tiny_checkpoints import VOCAB_SIZE, write_byte_tokenizer

# The application generates and builds models in threads of its own while engines of both kinds
# load, answer and close. A watcher looks at what they share all the while.
_SCRIPT = """
import json, sys, threading, warnings
order, native, other = sys.argv[1:4]
warnings.simplefilter("error")
if order == "engine first":
    import engine
import os
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface
if order == "transformers first":
    import engine
from engine import Engine, SamplingParams

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # the application's own choice
config = transformers.LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=2,
)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(native)
prompt = torch.tensor([[5, 6, 7, 8]])

def answer():
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        pad_token_id=0,
    ).tolist()

def shared_state():
    functions = {name: AttentionInterface()[name] for name in known}
    masks = {name: AttentionMaskInterface()[name] for name in known_masks}
    return {
        "default dtype": str(torch.get_default_dtype()),
        "attention": {name: repr(value) for name, value in functions.items()},
        "masks": {name: repr(value) for name, value in masks.items()},
        "attention of the model": model.config._attn_implementation,
        "generation config": model.generation_config.to_dict(),
        "class's attention": transformers.LlamaForCausalLM.forward.__qualname__,
        "tie_weights": repr(transformers.PreTrainedModel.tie_weights),
        "init_weights": repr(transformers.PreTrainedModel.init_weights),
        "normal_": repr(torch.nn.init.normal_),
        "linspace": repr(torch.linspace),
        "verbosity": transformers.logging.get_verbosity(),
        "parallelism": os.environ.get("TOKENIZERS_PARALLELISM"),
        "grad": torch.is_grad_enabled(),
        "rng": int(torch.get_rng_state().to(torch.int64).sum()),
    }

known = tuple(AttentionInterface().valid_keys())
known_masks = tuple(AttentionMaskInterface().valid_keys())
before, expected = shared_state(), answer()
changes, wrong = set(), []
stop = threading.Event()

def watch():
    while not stop.is_set():
        now = shared_state()
        changes.update(key for key in before if now[key] != before[key])
        stop.wait(0.002)

def generate():
    while not stop.is_set():
        if answer() != expected:
            wrong.append("answer")
        if tokenizer("the answer is")["input_ids"] != ids:
            wrong.append("tokens")

ids = tokenizer("the answer is")["input_ids"]
threads = [threading.Thread(target=target) for target in (watch, generate)]
for thread in threads:
    thread.start()
options = dict(device="cpu", num_threads=1, max_model_len=64, max_num_seqs=4)
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
answers = []
try:
    for _ in range(2):
        with Engine(native, **options) as first, Engine(other, **options) as second:
            handles = [eng.submit([5, 6, 7], params) for eng in (first, second)]
            answers.append([list(h.result().outputs[0].token_ids) for h in handles])
finally:
    stop.set()
    for thread in threads:
        thread.join()
new = sorted(set(AttentionInterface().valid_keys()) - set(known))
print(json.dumps([sorted(changes), wrong, answers, new, answer() == expected]))
"""


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that runs in transformers' own code."""
    folder = tmp_path_factory.mktemp("other")
    other_model("arcee", vocab_size=VOCAB_SIZE).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("order", ["engine first", "transformers first"])
def test_neither_disturbs_the_other(tiny_llama: Path, other_folder: Path, order: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, order, str(tiny_llama), str(other_folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    changes, wrong, answers, new, still_right = json.loads(done.stdout.splitlines()[-1])
    assert changes == []
    assert wrong == []
    assert still_right
    # The same answers beside a busy application, both times.
    assert answers[0] == answers[1]
    assert new == ["llm_connectors_paged"]
    # No advice about forks, threads or tokenizers that the application did not cause.
    assert "parallelism" not in done.stderr
    assert "fork" not in done.stderr
