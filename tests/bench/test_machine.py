from gateway import __version__
from gateway.bench.machine import machine_facts


def test_the_facts_of_this_machine_are_there_and_none_is_empty() -> None:
    facts = machine_facts()
    assert {"cores", "system", "python", "gateway"} <= set(facts)
    assert facts["gateway"] == __version__
    assert all(facts.values())
