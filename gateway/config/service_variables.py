"""Variables that Kubernetes and Docker set for the services that a container can reach. Pure.

For a Service named `gateway-metrics`, Kubernetes sets GATEWAY_METRICS_PORT to `tcp://address:port`
in each container of the namespace, and more variables beside it. None of them is a setting.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address

PREFIXES = ("GATEWAY_", "OLLAMA_", "VLLM_", "LLM_")
"""Prefixes of the gateway's own variables."""

_PROTOCOLS = "TCP|UDP|SCTP"
_URL = re.compile(rf"({_PROTOCOLS})://\S+", re.IGNORECASE)
# The name of a port has single underscores only, unlike GATEWAY__SECTION__KEY.
_SERVICE = re.compile(r"\w+_SERVICE_(HOST|PORT(_[A-Z0-9]+)*)")
_PORT = re.compile(rf"\w+_PORT_\d+_({_PROTOCOLS})(_(PROTO|PORT|ADDR))?")
_LINK_NAME = re.compile(r"(/[\w.-]+){2}")  # of a Docker link: /client/alias


def is_service_variable(name: str, value: str) -> bool:
    """Return whether Kubernetes or a Docker link has set this variable, and not the operator.

    `…_PORT` can also be a setting, and so can any name with `__`, because a Service's name may have
    `--`. There the value decides.
    """
    if not name.startswith(PREFIXES):
        return False
    if name.endswith("_PORT") and _URL.fullmatch(value.strip()):
        return True
    if name.endswith("_NAME") and _LINK_NAME.fullmatch(value.strip()):
        return True
    if not (_SERVICE.fullmatch(name) or _PORT.fullmatch(name)):
        return False
    return "__" not in name or _is_service_value(value.strip())


def _is_service_value(value: str) -> bool:
    if value.isdecimal() or value.lower() in _PROTOCOLS.lower().split("|") or _URL.fullmatch(value):
        return True
    try:
        ip_address(value)
    except ValueError:
        return False
    return True


def without_service_variables(variables: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables of the operator, and the sorted names of those of services."""
    services = sorted(name for name, value in variables.items() if is_service_variable(name, value))
    return {name: value for name, value in variables.items() if name not in set(services)}, services
