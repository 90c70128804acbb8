"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Optional YAML file of settings.", envvar="GATEWAY_CONFIG"),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the gateway's response as JSON.")]
TierName = Annotated[str | None, typer.Option("--tier", help="Only this tier. Default: every tier that is not pinned.")]
