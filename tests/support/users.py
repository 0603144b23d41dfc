"""A stand-in for `app/users.py` of fastapi-users' tutorial, with the few methods that a WebSocket needs.

Its real package would bring a dozen others along; the recipe in the documentation was tried with it by hand.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import UUID

open_sessions: list[str] = []
"""The database sessions that are open now."""


@dataclass
class User:
    """A row of the users' table."""

    id: UUID
    is_active: bool


class UserManager:
    """Stands for `BaseUserManager`."""

    def __init__(self) -> None:
        self.users = {"token-of-ada": User(UUID(int=1), True), "token-of-bob": User(UUID(int=2), False)}


class Strategy:
    """Stands for `JWTStrategy` or `DatabaseStrategy`."""

    async def read_token(self, token: str | None, user_manager: UserManager) -> User | None:
        return user_manager.users.get(token or "")


class AuthenticationBackend:
    """Stands for the one of the same name; its `get_strategy` is a dependency."""

    def get_strategy(self) -> Strategy:
        return Strategy()


auth_backend = AuthenticationBackend()


async def get_user_manager() -> AsyncIterator[UserManager]:
    open_sessions.append("session")
    yield UserManager()
    open_sessions.pop()
