"""Ask the router with the stock OpenAI client, once it and the engine behind it are up: python ask.py URL PROMPT ..."""

import sys
import time

import openai

url, *prompts = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def ask(prompt: str, model: str) -> str:
    """The expert that was asked, and its answer."""
    told = client.completions.with_raw_response.create(model=model, prompt=prompt, max_tokens=8)
    return f"{told.headers['x-metamoe-expert']}: {told.parse().choices[0].text!r}"


def first_answer(prompt: str, seconds: int = 600) -> str:
    """The same, as soon as there is one: an engine takes its time to load a model."""
    until = time.monotonic() + seconds
    while True:
        try:
            return ask(prompt, client.models.list().data[0].id)
        except (openai.APIConnectionError, openai.InternalServerError):
            if time.monotonic() > until:
                raise
            time.sleep(1)


for text in prompts:
    print(first_answer(text))
