"""Ask a model that runs inside this process."""

from engine import Engine, SamplingParams

with Engine("smollm2-135m") as engine:
    answer = engine.chat(
        [{"role": "user", "content": "Name the capital of France."}],
        SamplingParams(temperature=0.0, max_tokens=32),
    )
    print(answer.outputs[0].text)

    # A list in is one batch: all prompts run together, and the list comes back in order.
    outputs = engine.generate(
        ["Once upon a time", "The three primary colours are"],
        SamplingParams(temperature=0.0, max_tokens=24),
    )
    for output in outputs:
        print(repr(output.prompt), "->", repr(output.outputs[0].text))

    stats = engine.stats()
    print(f"{stats.output_tokens} tokens, at most {stats.peak_running} requests at once")
