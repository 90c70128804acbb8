"""The relay of a request without content: it waits until its model is ready, and sends nothing."""

from gateway.admission.ticket import Ticket
from gateway.body_memory import HeldBody
from gateway.chat.answer import Answer
from gateway.relay.chat import ChatRelay
from gateway.upstream.server import Server


class LoadRelay(ChatRelay):
    """A request to load a model: it gets a slot as any chat does, which loads the model first."""

    __slots__ = ()

    async def _exchange(self, server: Server) -> None:
        self._answer_json(self._rendered(Answer("", "", "stop", None, [], None)))

    def _record_success(self, ticket: Ticket, server: Server, sent: float) -> None:
        """Record nothing: the server was not asked, so this is no sign of its health."""


class UnloadRelay(LoadRelay):
    """A request to unload a model, which is answered at once: the gateway decides what is loaded."""

    __slots__ = ()

    async def __call__(self, held: HeldBody) -> None:
        self._answer_json(self._rendered(Answer("", "", "stop", None, [], None)))
        self._record(None)
