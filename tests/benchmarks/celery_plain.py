"""Plain Celery, as one would write it: a task around the sync SDK. Nothing is counted or kept."""

from __future__ import annotations

import os
from functools import cache

from celery import Celery
from openai import OpenAI

ASK = "plain.ask"

app = Celery("plain", broker=os.environ["BENCH_BROKER_URL"])
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True


@cache
def client() -> OpenAI:
    """Return the process' client, made when it is first used: also after a fork."""
    return OpenAI(max_retries=0)


@app.task(name=ASK)
def ask(model: str, content: str) -> str:
    """Ask for one answer."""
    completion = client().chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=1024,
    )
    return completion.choices[0].message.content or ""
