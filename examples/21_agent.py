# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]", "pydantic-ai-slim[openai]>=2"]
# ///
"""An agent of Pydantic AI behind `useChat` of the Vercel AI SDK. It works on when the page is closed.

Run it with `pip install "pydantic-ai-slim[openai]"` and `uvicorn 21_agent:app` in this directory. A page has
`useChat({ id, resume: true })`. Without a page: `curl -N http://127.0.0.1:8000/api/chat
--json '{"id": "1", "messages": [{"role": "user", "parts": [{"type": "text", "text": "hello"}]}]}'` shows the chunks
that the SDK reads: a call of a tool, its result, and the answer. `MODEL=openai:gpt-5-mini` names a model. Without it,
the app uses Pydantic AI's model for tests. With `BROKER_URL=sqlite:///agent.db` it runs with `--workers 4`, too.
"""

import os
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Response
from pydantic import BaseModel, Field
from pydantic_ai import (
    Agent,
    AgentRunResultEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
)

from wsbroadcast import ConnectionManager, Run, StreamExists, ui_message_stream

manager = ConnectionManager(os.environ.get("BROKER_URL", "memory://"))
app = FastAPI(lifespan=manager.lifespan)
agent = Agent(os.environ.get("MODEL", "test"))
saved: dict[str, list[ModelMessage]] = {}  # stands for your database

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
User = Annotated[str, Header(alias="x-user", pattern=r"^[a-z]{1,20}$")]  # stands for your login


class Message(BaseModel):
    role: str
    parts: list[dict[str, Any]]


class Chat(BaseModel):
    id: Id
    messages: Annotated[list[Message], Field(min_length=1)]


@agent.tool_plain
async def weather(city: str) -> str:
    return f"It rains in {city}."


@app.post("/api/chat")
async def begin(asked: Chat, user: User = "guest") -> Response:
    prompt = "".join(part["text"] for part in asked.messages[-1].parts if part.get("type") == "text")
    name = f"chat:{user}:{asked.id}"
    try:
        run = await manager.start_stream(name, partial(answer, prompt), user=user)
    except StreamExists:
        raise HTTPException(409, "the last answer is still being written") from None
    return ui_message_stream(manager, run)


@app.get("/api/chat/{chat}/stream")
async def resume(chat: Id, user: User = "guest") -> Response:
    return ui_message_stream(manager, f"chat:{user}:{chat}", user=user)


@app.post("/api/chat/{chat}/stop", status_code=204)
async def stop(chat: Id, user: User = "guest") -> None:
    await manager.stop_stream(f"chat:{user}:{chat}")  # cancels the agent's request and its tools


async def answer(prompt: str, run: Run) -> None:
    async with agent.run_stream_events(prompt, message_history=saved.get(run.id)) as events:
        async for event in events:
            match event:
                case PartStartEvent(part=TextPart(content=text)):
                    run.append(text)
                case PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
                    run.append(text)
                case FunctionToolCallEvent(part=call):
                    asked = {"id": call.tool_call_id, "name": call.tool_name, "input": call.args_as_dict()}
                    run.append({"type": "tool_call", **asked})
                case FunctionToolResultEvent(part=part):
                    run.append({"type": "tool_result", "id": part.tool_call_id, "output": part.content})
                case AgentRunResultEvent(result=result):
                    saved[run.id] = result.all_messages()


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
