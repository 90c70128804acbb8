"""Types of the fields of the settings document: each parses and checks one kind of value. Pure."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from gateway.config import parsers
from gateway.config.settings import LogLevel as _LogLevel

_DurationInput = Annotated[float, Field(ge=0)] | Annotated[str, Field(pattern=parsers.DURATION_PATTERN)]
_CountInput = Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^\s*\d+\s*$")]
_CountOrZeroInput = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\s*\d+\s*$")]
_SizeInput = Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=parsers.SIZE_PATTERN)]

Duration = Annotated[float, BeforeValidator(parsers.positive_duration, json_schema_input_type=_DurationInput)]
DurationOrZero = Annotated[float, BeforeValidator(parsers.duration, json_schema_input_type=_DurationInput)]
Size = Annotated[int, BeforeValidator(parsers.size, json_schema_input_type=_SizeInput)]
Count = Annotated[int, BeforeValidator(parsers.count(1), json_schema_input_type=_CountInput)]
CountOrZero = Annotated[int, BeforeValidator(parsers.count(0), json_schema_input_type=_CountOrZeroInput)]
Pixels = Annotated[
    int,
    BeforeValidator(
        parsers.count(1024, 64_000_000), json_schema_input_type=Annotated[int, Field(ge=1024, le=64_000_000)]
    ),
]
CountOrAuto = Annotated[
    int | Literal["auto"], BeforeValidator(parsers.count_or_auto, json_schema_input_type=_CountInput | Literal["auto"])
]
Share = Annotated[
    float,
    BeforeValidator(
        parsers.number(0, 0.5, "a number from 0 to 0.5"), json_schema_input_type=Annotated[float, Field(ge=0, le=0.5)]
    ),
]
Ratio = Annotated[
    float,
    BeforeValidator(
        parsers.number(1, 100, "a number from 1 to 100"), json_schema_input_type=Annotated[float, Field(ge=1, le=100)]
    ),
]
Chance = Annotated[
    float,
    BeforeValidator(
        parsers.number(1e-6, 0.5, "a number from 0.000001 to 0.5"),
        json_schema_input_type=Annotated[float, Field(ge=1e-6, le=0.5)],
    ),
]
Port = Annotated[
    int, BeforeValidator(parsers.count(0, 65535), json_schema_input_type=Annotated[int, Field(ge=0, le=65535)])
]
Key = Annotated[SecretStr, BeforeValidator(parsers.key, json_schema_input_type=str)]
Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(parsers.keys, json_schema_input_type=str | list[str])]
RedisUrl = Annotated[SecretStr, BeforeValidator(parsers.redis_url, json_schema_input_type=str)]
Command = Annotated[tuple[str, ...], BeforeValidator(parsers.command, json_schema_input_type=str | list[str])]
HeaderName = Annotated[str, BeforeValidator(parsers.header_name, json_schema_input_type=str)]
HeaderValue = Annotated[SecretStr, BeforeValidator(parsers.header_value, json_schema_input_type=str)]
ImagePrefix = Annotated[str, BeforeValidator(parsers.image_prefix, json_schema_input_type=str)]
HostName = Annotated[str, BeforeValidator(parsers.host_name, json_schema_input_type=str)]
IpNetwork = Annotated[str, BeforeValidator(parsers.network, json_schema_input_type=str)]
CorsOrigin = Annotated[str, BeforeValidator(parsers.origin, json_schema_input_type=str)]
Name = Annotated[str, BeforeValidator(parsers.name, json_schema_input_type=str)]
PublicName = Annotated[str, BeforeValidator(parsers.public_name, json_schema_input_type=str)]
ModelName = Annotated[str, BeforeValidator(parsers.model_name, json_schema_input_type=str)]
KeepAlive = Annotated[int | float | str, BeforeValidator(parsers.keep_alive, json_schema_input_type=float | str)]


def _fallback(value: object) -> bool | str:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool | str) and value != "":
        return value
    raise ValueError("expected true, false or the name of a backend")


def _flag(value: object) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool):
        return value
    raise ValueError("expected true or false")


def _in_lower_case(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


LogLevel = Annotated[_LogLevel, BeforeValidator(_in_lower_case, json_schema_input_type=_LogLevel)]
Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=bool)]
Fallback = Annotated[bool | str, BeforeValidator(_fallback, json_schema_input_type=bool | str)]


class DocumentSection(BaseModel):
    """A mapping in the file. Unknown keys are refused; a key without a value counts as absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None or key not in cls.model_fields}
        return {} if value is None else value


def empty_if_none(value: object) -> object:
    """Return an empty mapping for an entry without a value."""
    return {} if value is None else value
