"""Ask a list of questions with LangChain in one batch: no threads, no server."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from llm_connectors.langchain import ChatLocal

chat = ChatLocal(model="smollm2-135m", temperature=0, max_tokens=24)
prompt = ChatPromptTemplate.from_messages([("human", "What is the capital of {country}?")])
chain = prompt | chat | StrOutputParser()

countries = ["France", "Japan", "Egypt", "Peru", "Norway", "Spain"]
inputs = [{"country": country} for country in countries]

# The whole list reaches the engine at once; the answers come back in order.
for country, answer in zip(countries, chain.batch(inputs), strict=True):
    print(f"{country}: {answer}")

# As they finish, at most two in flight, errors in their place instead of raised.
pairs = chain.batch_as_completed(inputs, {"max_concurrency": 2}, return_exceptions=True)
for index, answer in pairs:
    print(f"{countries[index]} is done: {answer!r}")

# Options of one call, and the token counts of its answer.
message = chat.invoke("Name three colours.", max_tokens=16, stop=["\n\n"])
print(message.content, message.usage_metadata)

chat.close()  # frees the model's memory
