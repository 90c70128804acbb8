"""Metrics of several replicas on one page: a label with the replica's number, and families joined.

Each series keeps its own replica, as it keeps its own instance where every replica is scraped by
itself. So a counter begins anew with the replica that was started again and with no other, and what
sums or compares over instances does so over replicas.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

LABEL = "replica"

_FAMILY = b"# HELP "
_END = b"# EOF\n"


class Collectable(Protocol):
    def collect(self) -> Iterable[Metric]: ...


class LabelledRegistry:
    """The metrics of a registry, each series with the label `replica`."""

    def __init__(self, registry: Collectable, replica: int) -> None:
        self._registry = registry
        self._value = str(replica)

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            labelled = Metric(family.name, family.documentation, family.type, family.unit)
            labelled.samples = [self._labelled(sample) for sample in family.samples]
            yield labelled

    def _labelled(self, sample: Sample) -> Sample:
        return sample._replace(labels={**sample.labels, LABEL: self._value})


def join_pages(pages: Iterable[bytes]) -> bytes:
    """Return one page with the series of several pages in the same format.

    A family is there once, as both formats ask for: its comments first, then its series of all pages.
    """
    families: dict[bytes, list[bytes]] = {}
    is_open_metrics = False
    for page in pages:
        if page.endswith(_END):
            is_open_metrics = True
            page = page.removesuffix(_END)
        for block in page.split(b"\n" + _FAMILY):
            comments, series = _split(block.removeprefix(_FAMILY))
            if comments:
                families.setdefault(comments, []).append(series)
    parts = [_FAMILY + comments + b"".join(series) for comments, series in families.items()]
    return b"".join(parts) + (_END if is_open_metrics else b"")


def _split(block: bytes) -> tuple[bytes, bytes]:
    """Split the text of a family, without its first `# HELP `, into comments and series, each with its line ends."""
    lines = block.rstrip(b"\n").split(b"\n")
    count = 1
    while count < len(lines) and lines[count].startswith(b"# "):
        count += 1
    series = lines[count:]
    return b"\n".join(lines[:count]) + b"\n" if lines[0] else b"", b"".join([line + b"\n" for line in series])
