"""Sources of the settings, merged with pydantic-settings: environment, `.env`, then the file."""

from collections.abc import Iterable
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class MappingSource(PydanticBaseSettingsSource):
    """Source of pydantic-settings that returns a mapping in the shape of the file."""

    def __init__(self, settings_cls: type[BaseSettings], mapping: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._mapping = mapping

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return nothing; unused, because the source returns its mapping as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._mapping


class LayeredSettings(BaseSettings):
    """Merged sources, unvalidated: the document validates them and reports all mistakes at once."""

    model_config = SettingsConfigDict(extra="allow")


def merge(mappings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge mappings key by key, also within nested mappings; earlier ones take precedence."""
    ordered = tuple(MappingSource(LayeredSettings, mapping) for mapping in mappings)

    class Merged(LayeredSettings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return ordered

    return dict(Merged().model_extra or {})
