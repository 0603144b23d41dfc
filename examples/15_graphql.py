# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]", "strawberry-graphql[fastapi]"]
# ///
"""GraphQL: a subscription with Strawberry that goes on where the client was.

Run it with `pip install "strawberry-graphql[fastapi]"` and `uvicorn 15_graphql:app` in this directory. Open
http://localhost:8000/graphql in two tabs. Run `subscription { messages(room: "tea") { text position } }` in one, and
`mutation { say(room: "tea", text: "hello") }` in the other: the message appears in the first tab. Stop the
subscription, say something else, and subscribe again with the last position you got:
`subscription { messages(room: "tea", since: "…") { text position } }`.
"""

from collections.abc import AsyncGenerator

import strawberry
from fastapi import FastAPI
from strawberry.fastapi import GraphQLRouter

from wsbroadcast import ConnectionManager, History

manager = ConnectionManager(history={"room:*": History()})


@strawberry.type
class Message:
    text: str
    position: str


@strawberry.type
class Room:
    messages: list[Message]
    position: str


@strawberry.type
class Query:
    @strawberry.field
    async def room(self, name: str) -> Room:
        page = await manager.history(f"room:{name}")
        messages = [Message(text=message.data, position=str(message.position)) for message in page.messages]
        return Room(messages=messages, position=str(page.position))


@strawberry.type
class Mutation:
    @strawberry.mutation
    async def say(self, room: str, text: str) -> str:
        receipt = await manager.broadcast(text, channel=f"room:{room}")
        return str(receipt.position)


@strawberry.type
class Subscription:
    @strawberry.subscription
    async def messages(self, room: str, since: str | None = None) -> AsyncGenerator[Message, None]:
        channel = f"room:{room}"
        async with manager.listen(channel, since=since) as messages:
            if since is not None and not messages.recovered[channel].recovered:
                raise ValueError("too much was missed: ask for the room, and subscribe since its position")
            async for message in messages:  # raises `Lagged` for a client that reads too slowly
                yield Message(text=message.data, position=str(message.position))


schema = strawberry.Schema(query=Query, mutation=Mutation, subscription=Subscription)
app = FastAPI(lifespan=manager.lifespan)
app.include_router(GraphQLRouter(schema), prefix="/graphql")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
