"""The relay of one text completion: a chat without a template, whose answer goes as it is."""

from gateway.chat.answer import Delta
from gateway.chat.completion import Completion
from gateway.engines.completions import Completer
from gateway.engines.engine import Engine
from gateway.errors import InvalidRequest
from gateway.relay.chat import ChatRelay
from gateway.relay.context import RelayContext
from gateway.relay.requests import ChatRequest, ClientConnection
from gateway.upstream.server import Server


class CompletionRelay(ChatRelay):
    """One text completion. Nothing in the answer counts as thoughts or as a tool call."""

    text_field = "prompt"

    __slots__ = ("_echo",)

    def __init__(self, context: RelayContext, client: ClientConnection, request: ChatRequest) -> None:
        super().__init__(context, client, request)
        self._is_passthrough = True
        self._splices = self._around_text is not None
        chat = request.chat
        self._echo = chat.prompt if isinstance(chat, Completion) and chat.echo else ""
        """Text that precedes the first piece of the answer."""

    def _relax_request(self, refusal: InvalidRequest) -> bool:
        relaxed = self._backend.completer.relaxed(self._chat, refusal)
        if relaxed is not None:
            self._chat = relaxed
        return relaxed is not None

    def _endpoint(self, server: Server) -> tuple[Engine | Completer, bytes]:
        completer = self._backend.completer
        return completer, server.head_of(completer.path, self._request.came_through, self._context.gateway_id)

    def _normalized(self, deltas: list[Delta]) -> list[Delta]:
        if self._echo:
            deltas[0].content = self._echo + deltas[0].content
            self._echo = ""
        return deltas

    def _send_keepalive(self) -> None:
        """Send an event with an empty text: a stream begins with none."""
        was_started = self._started
        super()._send_keepalive()
        if self._renderer is not None and self._started and not was_started:
            self._client.write(self._renderer.keepalive())
