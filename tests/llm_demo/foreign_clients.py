"""Clients too heavy for the test environment, against a running demo. docs/RELIABILITY.md says how to run it."""

import sys
from collections.abc import Callable

ASKED = "What is the capital of France? Answer briefly."


def litellm(url: str, model: str) -> None:
    import litellm

    options = {"temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 2}
    messages = [{"role": "user", "content": ASKED}]
    answer = litellm.completion(model=f"openai/{model}", api_base=url, api_key="x", messages=messages, **options)
    scores = answer.choices[0].logprobs.content
    print("litellm:", answer.choices[0].message.content, f"({len(scores)} tokens, scored)")


def langchain(url: str, model: str) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    chat = ChatOpenAI(model=model, base_url=url, api_key="x", temperature=0, max_tokens=32)
    print("langchain-openai:", chat.invoke(ASKED).content)
    print("langchain-openai, streamed:", "".join(chunk.content for chunk in chat.stream(ASKED)))
    print("langchain-openai, structured:", chat.with_structured_output(City, method="json_schema").invoke(ASKED))
    print("langchain-openai, tool:", chat.bind_tools([City], tool_choice="City").invoke(ASKED).tool_calls[0]["args"])


def llama_index(url: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    options = {"temperature": 0, "max_tokens": 16}
    chat = OpenAILike(model=model, api_base=url, api_key="x", is_chat_model=True, **options)
    print("llama-index:", chat.chat([ChatMessage(role="user", content=ASKED)]).message.content)


def main(url: str, model: str) -> int:
    clients: list[Callable[[str, str], None]] = [litellm, langchain, llama_index]
    failed = 0
    for client in clients:
        try:
            client(url, model)
        except Exception as error:  # each library raises its own
            failed += 1
            print(f"{client.__name__} failed: {type(error).__name__}: {error}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
