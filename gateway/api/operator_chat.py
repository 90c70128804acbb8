"""`POST /ops/chat`: an operator's chat with a tier on a backend of choice, to try it before a switch."""

from collections.abc import Mapping
from typing import Any

from gateway.api.admin_auth import AdminAccess
from gateway.api.auth import Caller
from gateway.api.chat import ChatEndpoint, ChatParts
from gateway.api.endpoint import EndpointParts, RequestContext
from gateway.api.request_headers import Fields, reject_loop
from gateway.chat.request import Chat
from gateway.dialects.dialect import ChatDialect
from gateway.errors import InvalidRequest, MethodNotAllowed
from gateway.relay.chat import ChatRelay
from gateway.relay.requests import ClientConnection
from gateway.relay.route import Route

PATH = "/ops/chat"
BACKEND = b"x-gateway-backend"
"""Request header with the backend that is to serve. Without it, the roll-out chooses."""


class OperatorChatRelay(ChatRelay):
    """Relay of an operator's chat. It stays on its backend when the roll-out changes."""

    @property
    def follows_rollout(self) -> bool:
        return False


class OperatorChatEndpoint(ChatEndpoint):
    """Endpoint like that for chat completions, with the operator's authorisation and choice of backend."""

    relay_class = OperatorChatRelay

    def __init__(
        self, dialect: ChatDialect, parts: EndpointParts, chat_parts: ChatParts, operator: AdminAccess
    ) -> None:
        """`operator` decides who has access."""
        super().__init__(dialect, parts, chat_parts)
        self._operator = operator

    def _identify(self, scope: Mapping[str, Any], client: ClientConnection, fields: Fields) -> Caller:
        peer = scope["client"]
        identity = self._operator.check(peer[0] if peer else None, scope["headers"])
        reject_loop(fields, self._context.gateway_id)
        if scope["method"] != "POST":
            raise MethodNotAllowed("POST")
        return Caller(identity)

    def _route(self, tier: str, chat: Chat, head: RequestContext) -> Route:
        name = head.fields.get(BACKEND)
        if name is None:
            return super()._route(tier, chat, head)
        models = {
            backend.lower(): (backend, model) for backend, model in self._context.settings.tiers[tier].models.items()
        }
        found = models.get(name.decode("latin-1").lower())
        if found is None:
            known = ", ".join(backend for backend, _ in models.values())
            raise InvalidRequest(f"The header x-gateway-backend must be one of: {known}.", param=BACKEND.decode())
        return Route(tier, *found)
