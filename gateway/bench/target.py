"""The seam between scenarios and the network: what to measure, one request, and the client that sends it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from gateway.bench.results import RequestRecord

Api = Literal["openai", "ollama"]
APIS: tuple[Api, ...] = get_args(Api)
ENDPOINTS: dict[Api, str] = {"openai": "/v1/chat/completions", "ollama": "/api/chat"}


@dataclass(frozen=True, slots=True)
class Target:
    """One side of a measurement: a server, its API and a model.

    Attributes:
        url: the base address, without a path of the API and without a slash at the end.
        label: name of the side in results, such as `ollama` or `A`.
        endpoint: the path below `url`. Completions (`/v1/completions`, `/api/generate`) take the last
            message's text as their prompt.
        headers: headers of every request.
        tls_verify: False accepts any certificate.
    """

    url: str
    model: str
    api: Api = "openai"
    label: str = ""
    api_key: str = field(default="", repr=False)
    endpoint: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    tls_verify: bool = True

    @property
    def path(self) -> str:
        return self.endpoint or ENDPOINTS[self.api]

    @property
    def name(self) -> str:
        """The label, or the address if there is none."""
        return self.label or self.url


@dataclass(frozen=True, slots=True)
class BenchImage:
    """An image as it is sent.

    Attributes:
        media_type: such as `image/png`.
        name: the file's name, for the report.
    """

    data: bytes = field(repr=False)
    media_type: str = "image/png"
    name: str = ""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request, independent of the API.

    Attributes:
        messages: a conversation in OpenAI's form, with text contents only; images are apart.
        max_tokens: longest answer in tokens. None: the server decides.
        model: overrides the target's model.
        language: of the prompt, for the report: `ko`, `en`, `ja` or empty.
        name: what the request stands for in a report: an image's file, a scenario's part.
        parameters: further top-level fields of the body, such as `temperature` or `ignore_eos`; for
            Ollama they become `options` where they belong there.
        timeout: seconds until the whole answer has to be there. None: no limit.
        keeps_text: the record keeps the answer's text. It is never written to a result.
    """

    messages: tuple[Mapping[str, str], ...] = field(repr=False)
    max_tokens: int | None = None
    images: tuple[BenchImage, ...] = ()
    model: str = ""
    language: str = ""
    name: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    stream: bool = True
    keeps_text: bool = False


class LoadClient(Protocol):
    """Sends requests to one target. One event loop uses it, with any number of requests at once."""

    @property
    def target(self) -> Target: ...

    async def send(self, request: BenchRequest, index: int = 0) -> RequestRecord:
        """Send one request and return its record.

        A failure is a record with an `error`, never an exception. Cancelling closes the connection.
        """
        ...

    async def get(self, path: str) -> tuple[int, bytes]:
        """Fetch a path below the target's address, such as `/v1/models`; return status and body.

        Raises:
            OSError, EOFError, TimeoutError: there is no response.
        """
        ...

    async def close(self) -> None:
        """Close idle connections."""
        ...
