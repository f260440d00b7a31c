"""Many prompts through the bare engine, with the snippet people write for vLLM."""

from engine import LLM, SamplingParams

llm = LLM(model="smollm2-135m", dtype="bfloat16")
params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=40)

countries = ["France", "Japan", "Brazil", "Kenya", "Canada", "India", "Norway", "Peru"]
conversations = [
    [{"role": "user", "content": f"Name one famous place in {country}."}] for country in countries
]
for country, output in zip(countries, llm.chat(conversations, params), strict=True):
    print(f"{country:8} {output.outputs[0].text.strip()}")

text = llm.generate("What is the capital of France?", SamplingParams(max_tokens=50))
print(text[0].outputs[0].text)
llm.close()
