"""A model with the name of another one."""

from __future__ import annotations

from pydantic import BaseModel


class Post(BaseModel):
    """Another post."""

    headline: str
