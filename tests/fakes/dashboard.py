"""The dashboard of Grafana as data: its panels and queries."""

import json
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "gateway.json"
DOCUMENT: dict[str, Any] = json.loads(FILE.read_text())
PANELS: list[dict[str, Any]] = DOCUMENT["panels"]

QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
QUERIES += [annotation["expr"] for annotation in DOCUMENT["annotations"]["list"]]
"""PromQL of all panels and annotations, with Grafana's variables."""

VALUES = {"tier": ".*", "backend": ".*", "__rate_interval": "1m"}
"""A value of each variable that the queries use."""


def substituted(query: str) -> str:
    """Return `query` with a value in place of each variable of Grafana."""
    return re.sub(r"\$(\w+)", lambda found: VALUES[found[1]], query)
