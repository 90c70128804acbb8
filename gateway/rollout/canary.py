"""Canary bucketing: every turn of a conversation gets the same bucket. Pure: no I/O, no clock."""

from hashlib import sha256

from gateway.chat.message import Message
from gateway.chat.request import Chat

WHOLE_IMAGE = 64 * 1024
"""Characters of an image URL up to which all of it is hashed. Of a longer one, the length and both
ends are, which no two images share, so that 10 MB take no longer."""


def canary_bucket(key_id: str, session: bytes, chat: Chat, buckets: int) -> int:
    """Return a number below `buckets`, the same for every turn of a conversation.

    Conversations are spread evenly over the buckets. `session` is the client's own name for the
    conversation. Without one, its beginning identifies it: the system message and the first user
    message with its images, which every turn sends again.
    """
    digest = sha256(b"%d:%b" % (len(key_id), key_id.encode()))
    if session:
        digest.update(b"session:" + session)
    else:
        for message in _beginning(chat.messages):
            for piece in _pieces(message):
                digest.update(b"%d:" % len(piece))
                digest.update(piece)
    return int.from_bytes(digest.digest()[:8]) % buckets


def _beginning(messages: list[Message]) -> list[Message]:
    """Return the first user message, preceded by the system message if there is one.

    A system message after the first user message is not part of the beginning.
    """
    found: list[Message] = []
    for message in messages:
        if message.role == "user":
            return [*found, message]
        if message.role in ("system", "developer") and not found:
            found.append(message)
    return found


def _pieces(message: Message) -> list[bytes]:
    pieces = [message.role.encode(), message.text.encode()]
    for url in message.images:
        if len(url) > WHOLE_IMAGE:
            url = f"{len(url)}:{url[: WHOLE_IMAGE // 2]}{url[-WHOLE_IMAGE // 2 :]}"
        pieces.append(url.encode())
    return pieces
