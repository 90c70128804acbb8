"""Pages of metrics: made family by family, and those of several replicas joined to one.

The series of several replicas have a label with the replica's number. Each series keeps its own replica,
as it keeps its own instance where every replica is scraped by itself. So a counter begins anew with the
replica that was started again and with no other, and what sums or compares over instances does so over
replicas.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

LABEL = "replica"

SAMPLES = 200
"""Samples whose text is made in one step, which takes 1 to 3 ms."""

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


class _Family:
    """Registry of one family, or of a part of it."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


class _Page:
    """Page that is put together from others in the same format.

    A family is there once, as both formats ask for: its comments first, then its series of all pages.
    """

    def __init__(self) -> None:
        self._families: dict[bytes, list[bytes]] = {}
        self._is_open_metrics = False

    def add(self, page: bytes) -> None:
        if page.endswith(_END):
            self._is_open_metrics = True
            page = page.removesuffix(_END)
        for block in page.removeprefix(_FAMILY).split(b"\n" + _FAMILY):
            comments, series = _split(block)
            if comments:
                self._families.setdefault(comments, []).append(series)

    def content(self) -> bytes:
        parts = [part for comments, series in self._families.items() for part in (_FAMILY, comments, *series)]
        return b"".join(parts) + (_END if self._is_open_metrics else b"")


def page_steps(registry: Collectable, encode: Callable[[Any], bytes]) -> Generator[None, None, bytes]:
    """Return the page with all metrics of a registry. It yields after each family, or part of one.

    A registry may yield a family in several parts, one after the other.
    """
    page = _Page()
    for family in registry.collect():
        for part in _parts(family):
            page.add(encode(_Family(part)))
            yield
    return page.content()


def _parts(family: Metric) -> Iterator[Metric]:
    samples = family.samples
    if len(samples) <= SAMPLES:
        yield family
        return
    for start in range(0, len(samples), SAMPLES):
        part = Metric(family.name, family.documentation, family.type, family.unit)
        part.samples = samples[start : start + SAMPLES]
        yield part


def join_pages(pages: Iterable[bytes]) -> bytes:
    """Return one page with the series of several pages in the same format."""
    joined = _Page()
    for page in pages:
        joined.add(page)
    return joined.content()


def _split(block: bytes) -> tuple[bytes, bytes]:
    """Split the text of a family, without its first `# HELP `, into comments and series, each with its line ends."""
    text = block.rstrip(b"\n") + b"\n"
    end = text.index(b"\n") + 1
    while text.startswith(b"# ", end):
        end = text.index(b"\n", end) + 1
    return (text[:end], text[end:]) if end > 1 else (b"", b"")
