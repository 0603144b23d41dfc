"""The demo: a page whose tabs chat, stall and flood each other. `python -m wsbroadcast demo` serves it."""

from wsbroadcast.demo.app import create_app

__all__ = ["create_app"]
