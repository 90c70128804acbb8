"""Error responses in vLLM's shape. Pure."""

from typing import Any

ErrorDetail = dict[str, Any]
"""One of pydantic's validation errors."""


class VllmApiError(Exception):
    """An error response in vLLM's shape; `kind` is its `type`."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None, **value: Any) -> VllmApiError:
    """Return a 400 of vLLM's own checks.

    The message ends with `param` and with `value=…`, if given.
    """
    if param is not None:
        message += f" (parameter={param}" + (f", value={value['value']})" if value else ")")
    return VllmApiError(400, message, param=param)


def error_detail(kind: str, where: str, message: str, value: Any, **context: Any) -> ErrorDetail:
    """Return one validation error as pydantic reports it."""
    shown = f"<{type(value).__name__} of {len(value)} items>" if isinstance(value, (list, dict)) else str(value)
    return {"type": kind, "loc": where, "msg": message, "input": shown, **({"ctx": context} if context else {})}


def validation_failed(*details: ErrorDetail) -> VllmApiError:
    """Return FastAPI's validation error as vLLM renders it."""
    head = f"{len(details)} validation error{'s' if len(details) > 1 else ''}:"
    return VllmApiError(400, head + "".join(f"\n  {detail}" for detail in details), "Bad Request", details[0]["loc"])
