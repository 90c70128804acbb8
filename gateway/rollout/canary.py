"""Which conversation a request belongs to, as a bucket of a canary. Pure."""

from hashlib import sha256

from gateway.chat.request import Chat, Message

WHOLE_IMAGE = 64 * 1024
"""Characters of an image up to which all of it tells; of a larger one its length and both ends do, which no two pictures share, and which
takes 10 MB no longer."""


def canary_bucket(key_id: str, session: bytes, chat: Chat, buckets: int) -> int:
    """A number below `buckets`, the same for each turn of a conversation, and evenly spread over conversations.

    `session` is the client's own name for it. Without one its beginning has to do: the system message and the first user message with its
    images, which every turn sends again.
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
    """The first user message, and the system message where one stands before it: one that comes later is no part of the beginning."""
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
