"""Settings: read from a YAML file, `.env` and the environment, checked as a whole, then frozen.

The rest of the gateway gets `Settings` and relies on it. Nothing else reads the environment.
"""

from gateway.config.diff import AT_START, Differences, compare, is_same_place
from gateway.config.environment import VARIABLES
from gateway.config.keys_file import read_keys_file
from gateway.config.load import build, load
from gateway.config.parsers import base_url as normalise_base_url
from gateway.config.problems import ConfigError
from gateway.config.report import check, schema, show
from gateway.config.settings import (
    Alias,
    AutoRule,
    BackendLimits,
    BackendSettings,
    EmbeddingSettings,
    GuardRule,
    GuardSettings,
    Kind,
    LimitOverrides,
    LogLevel,
    ParamsSettings,
    Priority,
    RerankerSettings,
    ServerSettings,
    Settings,
    Task,
    Tier,
)

__all__ = [
    "AT_START",
    "VARIABLES",
    "Alias",
    "AutoRule",
    "BackendLimits",
    "BackendSettings",
    "ConfigError",
    "Differences",
    "EmbeddingSettings",
    "GuardRule",
    "GuardSettings",
    "Kind",
    "LimitOverrides",
    "LogLevel",
    "ParamsSettings",
    "Priority",
    "RerankerSettings",
    "ServerSettings",
    "Settings",
    "Task",
    "Tier",
    "build",
    "check",
    "compare",
    "is_same_place",
    "load",
    "normalise_base_url",
    "read_keys_file",
    "schema",
    "show",
]
