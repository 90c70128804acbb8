"""One server of a backend: which models it serves, whether it may get requests, and its request heads."""

import pytest

from gateway.config import ServerSettings
from gateway.engines.engine import ModelFacts
from gateway.engines.ollama_loading import canonical
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.server import Server, came_through_lines


def server(*models: str) -> Server:
    """Return a server of an Ollama. With `models`, the settings list them."""
    return Server(
        "box",
        ServerSettings(base_url="http://box", models=models or None),
        Pool(Origin("box", 80), connect_timeout=1, idle_seconds=1),
        b"POST /chat HTTP/1.1\r\n",
        b"POST /embed HTTP/1.1\r\n",
        canonical,
    )


# Models


def test_server_counts_as_having_every_model_until_it_has_answered_a_probe() -> None:
    box = server()
    assert box.serves("llama")
    box.update_models({"qwen:latest": ModelFacts()})
    assert (box.serves("llama"), box.serves("qwen")) == (False, True)


@pytest.mark.parametrize("name", ["llama", "llama:latest", "LLAMA", "library/llama"])
def test_server_serves_a_model_by_every_name_that_the_engine_accepts(name: str) -> None:
    box = server()
    facts = ModelFacts(context_length=512)
    box.update_models({"qwen:latest": ModelFacts(), "llama:latest": facts})
    assert box.serves(name)
    assert box.facts(name) is facts


def test_models_in_the_settings_take_precedence_over_the_reported_ones() -> None:
    box = server("llama")
    box.update_models({"qwen": ModelFacts()})
    assert (box.serves("llama"), box.serves("qwen")) == (True, False)


def test_facts_of_an_unknown_model_are_empty() -> None:
    box = server()
    assert box.facts("llama") == ModelFacts()
    box.update_models({})
    assert box.facts("llama") == ModelFacts()


def test_missing_model_is_not_served_until_the_next_probe() -> None:
    box = server("llama", "qwen")
    assert not box.lacks_a_model
    box.mark_missing("llama")
    assert (box.lacks_a_model, box.serves("llama"), box.serves("qwen")) == (True, False, True)
    box.update_models({})
    assert (box.lacks_a_model, box.serves("llama")) == (False, True)


# Health


def test_server_is_well_until_a_probe_or_its_circuit_says_otherwise() -> None:
    box = server()
    assert (box.up, box.is_well, box.is_up()) == (None, True, True)
    box.update_models({})
    assert (box.up, box.is_well) == (True, True)
    box.up = False
    assert not box.is_well
    box.up = True
    box.circuit.probe_missed(is_sure=True)
    assert (box.is_well, box.is_up()) == (False, False)


def test_excluded_server_gets_no_requests() -> None:
    box = server()
    box.is_excluded = True
    assert not box.is_up()


def test_half_open_server_gets_one_request_beside_those_in_all_its_lanes() -> None:
    box = server()
    box.circuit.probe_missed(is_sure=True)
    box.circuit.probe_answered()
    assert box.circuit.state == "half_open"
    box.slots.count = 1
    assert box.is_up()
    box.slots.count = 2
    assert not box.is_up()


def test_representation_shows_the_state() -> None:
    assert repr(server()) == ("<Server box, 0 in flight, up None, <CircuitBreaker closed, 0 of 20 failed, 0 in a row>>")


# Request heads


def test_head_of_a_direct_request_names_this_gateway_and_is_built_once() -> None:
    box = server()
    head = box.chat_head(b"", b"me")
    assert head == b"POST /chat HTTP/1.1\r\nX-Gateway-Via: me\r\n"
    assert box.chat_head(b"", b"me") is head


def test_head_of_a_request_through_other_gateways_names_them_too() -> None:
    box = server()
    direct = box.chat_head(b"", b"me")
    assert (
        box.chat_head(came_through_lines(b"one, two", b"me"), b"me")
        == b"POST /chat HTTP/1.1\r\nX-Gateway-Via: one, two, me\r\n"
    )
    assert box.chat_head(b"", b"me") is direct


@pytest.mark.parametrize(
    ("came_through", "via"),
    [(b"", b"me"), (came_through_lines(b"one", b"me"), b"one, me")],
    ids=["direct", "through one"],
)
def test_head_of_an_embedding_request(came_through: bytes, via: bytes) -> None:
    expected = b"POST /embed HTTP/1.1\r\nX-Gateway-Via: %b\r\n" % via
    assert server().embedding_head(came_through, b"me") == expected
