"""fastapi_websocket_pubsub. Clients subscribe and publish by remote calls, and answer each notification."""

from _serve import serve
from fastapi import FastAPI
from fastapi_websocket_pubsub import PubSubEndpoint

app = FastAPI()
PubSubEndpoint().register_route(app, "/ws")

if __name__ == "__main__":
    serve(app)
