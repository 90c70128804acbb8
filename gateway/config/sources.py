"""Lays the sources over each other with pydantic-settings: the environment above `.env` above the file."""

from collections.abc import Iterable
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class MappingSource(PydanticBaseSettingsSource):
    """A mapping in the file's shape, as a source of pydantic-settings."""

    def __init__(self, settings_cls: type[BaseSettings], mapping: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._mapping = mapping

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: a source gives its mapping as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._mapping


class LayeredSettings(BaseSettings):
    """All sources laid over each other, not validated yet: that is the document's part, which tells all that is wrong at once."""

    model_config = SettingsConfigDict(extra="allow")


def lay_over(mappings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One mapping from several, the first above the others; mappings within them are merged key by key."""
    ordered = tuple(MappingSource(LayeredSettings, mapping) for mapping in mappings)

    class Layered(LayeredSettings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return ordered

    return dict(Layered().model_extra or {})
