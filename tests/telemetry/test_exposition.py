"""Metrics of several replicas on one page, in both formats."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway.relay.turns import in_turns
from gateway.telemetry.exposition import SAMPLES, LabelledRegistry, join_pages, page_steps

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def page(replica: int, accept: str) -> bytes:
    registry = CollectorRegistry()
    Counter("requests_total", "Requests.", ("tier",), registry=registry).labels('a "tier"\n').inc(replica)
    Gauge("running", "Running.\nNow.", registry=registry).set(10 * replica)
    Histogram("seconds", "Seconds.", buckets=(1, 2), registry=registry).observe(1.5)
    if replica == 2:
        Gauge("only_here", "Only on the second.", registry=registry).set(1)
    encode, _ = choose_encoder(accept)
    return encode(LabelledRegistry(registry, replica))


@pytest.mark.parametrize("accept", ["", OPEN_METRICS])
def test_page_has_each_family_once_with_the_series_of_all_replicas(accept: str) -> None:
    text = join_pages([page(1, accept), page(2, accept)]).decode()
    families = list((parse_open_metrics if accept else parse_text)(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    values = {
        (sample.name, sample.labels["replica"], sample.labels.get("le")): sample.value
        for family in families
        for sample in family.samples
    }
    assert (values["requests_total", "1", None], values["requests_total", "2", None]) == (1, 2)
    assert (values["running", "1", None], values["running", "2", None]) == (10, 20)
    assert values["seconds_bucket", "2", "+Inf"] == 1
    assert values["only_here", "2", None] == 1
    assert ("only_here", "1", None) not in values
    (requests,) = [family for family in families if family.name == "requests"]
    assert {sample.labels["tier"] for sample in requests.samples} == {'a "tier"\n'}
    assert text.count("# EOF") == (1 if accept else 0)


def test_page_of_one_replica_is_left_as_it_is() -> None:
    one = page(1, "")
    assert join_pages([one]) == one


@pytest.mark.parametrize("accept", ["", OPEN_METRICS])
async def test_page_that_is_made_in_steps_is_the_same_page(accept: str) -> None:
    registry = CollectorRegistry()
    Counter("requests_total", "Requests.", ("tier",), registry=registry).labels('a "tier"\n# HELP x').inc(3)
    Counter("nothing_total", "Not counted yet.", ("tier",), registry=registry)
    Histogram("seconds", "Seconds.", buckets=(1, 2), registry=registry).observe(1.5)
    encode, _ = choose_encoder(accept)
    assert sum(1 for _ in page_steps(registry, encode)) == 3
    assert await in_turns(page_steps(registry, encode)) == encode(registry)


@pytest.mark.parametrize("accept", ["", OPEN_METRICS])
async def test_large_family_is_made_in_several_steps(accept: str) -> None:
    """50 tiers on four backends made steps of 90 ms."""
    registry = CollectorRegistry()
    seconds = Histogram("seconds", "Seconds.", ("tier",), buckets=(1, 2, 3, 4, 5), registry=registry)
    requests = Counter("requests_total", "Requests.", ("tier",), registry=registry)
    for number in range(SAMPLES):
        seconds.labels(f"tier {number}").observe(number % 7)
        requests.labels(f"tier {number}").inc(number)
    samples = sum(len(family.samples) for family in registry.collect())
    encode, _ = choose_encoder(accept)
    assert sum(1 for _ in page_steps(registry, encode)) == samples // SAMPLES
    assert await in_turns(page_steps(registry, encode)) == encode(registry)
