# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]", "openai"]
# ///
"""Answers of a model that outlive the page: reload in the middle, open a second tab, stop it from either.

Run it with `pip install openai` and `uvicorn 20_answers:app` in this directory. Open http://localhost:8000, ask
something, and copy the address into another tab. With `OPENAI_API_KEY`, a model answers; `OPENAI_BASE_URL` names
another service with the same API. Without a key, the app repeats your question. With `BROKER_URL=sqlite:///answers.db`
or `redis://localhost` it runs with `--workers 4`, too.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from functools import partial
from secrets import token_urlsafe
from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from openai import AsyncOpenAI

from wsbroadcast import ConnectionManager, Run, create_stream_router

PAGE = """<!doctype html>
<title>Answers</title>
<style>
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }
  form { display: flex; gap: .5rem }
  input { flex: 1; font: inherit; padding: .25rem .5rem }
  #answer, h2 { white-space: pre-wrap; overflow-wrap: anywhere }
</style>
<h1>Ask</h1>
<form><input aria-label="Question" required maxlength="2000"><button>Ask</button></form>
<p><span role="status"></span> <button id="stop" hidden>Stop</button></p>
<h2></h2>
<p id="answer"></p>
<script>
  const found = (selector) => document.querySelector(selector);
  const form = found("form"), answer = found("#answer"), status = found("[role=status]"), stop = found("#stop");
  const asked = found("h2");
  let entries = null, id = null;

  function show(text, isRunning) {
    status.textContent = text;
    stop.hidden = !isRunning;
  }

  function follow() {
    entries?.close();
    asked.textContent = answer.textContent = "";
    show("running", true);
    entries = new EventSource(`/answers/${id}`);  // reconnects by itself, and goes on where it was
    entries.onmessage = ({ data }) => {
      const entry = JSON.parse(data);
      if (entry.type === "reset") answer.textContent = "";
      if (entry.type === "data") asked.textContent = entry.data.question;
      if (entry.type === "text") answer.append(entry.text);
      if (entry.type === "end") {
        entries.close();
        show(entry.error ?? entry.state, false);
      }
    };
    entries.onerror = () => {
      if (entries.readyState === EventSource.CLOSED) show("there is no such answer", false);
    };
  }

  form.onsubmit = async (event) => {
    event.preventDefault();
    const question = form.querySelector("input").value;
    id = await (await fetch(`/questions?${new URLSearchParams({ question })}`, { method: "POST" })).json();
    history.pushState(null, "", `#${id}`);
    follow();
  };

  stop.onclick = () => fetch(`/answers/${id}/stop`, { method: "POST" });

  onpopstate = () => {
    id = location.hash.slice(1);
    if (id) follow();
  };
  onpopstate();
</script>
"""

manager = ConnectionManager(os.environ.get("BROKER_URL", "memory://"))
app = FastAPI()


async def current_user(user: Annotated[str | None, Cookie()] = None) -> str | None:
    return user  # stands for your login; only this user can see the answer


app.include_router(create_stream_router(manager, "/answers/{id}", authenticate=current_user))


@app.get("/")
async def page(user: Annotated[str | None, Depends(current_user)]) -> HTMLResponse:
    response = HTMLResponse(PAGE)
    if user is None:
        response.set_cookie("user", token_urlsafe(), httponly=True, samesite="lax")
    return response


@app.post("/questions")
async def ask(question: str, user: Annotated[str | None, Depends(current_user)]) -> str:
    if user is None:
        raise HTTPException(401, "open the page first")
    run = await manager.start_stream(token_urlsafe(12), partial(answer, question), user=user)
    return run.id


async def answer(question: str, run: Run) -> None:
    # No request waits for this. The page may go, and come back on another worker.
    run.append({"question": question})
    async for token in tokens(question):
        run.append(token)


async def tokens(question: str) -> AsyncIterator[str]:
    if "OPENAI_API_KEY" not in os.environ:
        for word in f"You have asked: {question} {LONG}".split():
            yield f"{word} "
            await asyncio.sleep(0.1)
        return
    async with AsyncOpenAI() as client:
        chunks = await client.chat.completions.create(
            model=os.environ.get("OPENAI_MODEL", "gpt-5-mini"),
            messages=[{"role": "user", "content": question}],
            stream=True,
        )
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content


LONG = "That is a good question, and a model would have an answer to it. Reload this page now: nothing is lost. " * 3


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
