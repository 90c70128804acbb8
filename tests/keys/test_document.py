"""Parser of the file of keys: what it accepts, and that it reports all mistakes and no key."""

import gc
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest
import yaml

from gateway.keys.document import FIELDS, KeysError, parse
from gateway.keys.policy import Limits
from tests.fakes.processor_time import assert_at_most

DIGEST = sha256(b"sk-web").hexdigest()


def entry(**fields: Any) -> str:
    return yaml.safe_dump({"keys": [{"name": "web", "sha256": DIGEST} | fields]})


def lines_of(text: str) -> tuple[str, ...]:
    with pytest.raises(KeysError) as caught:
        parse(text)
    return caught.value.lines


def test_every_field_is_read() -> None:
    (policy,) = parse(
        entry(
            tiers=["standard", "pro"], requests_per_minute=600, tokens_per_minute=1, tokens_per_day=3, concurrency=8,
            priority="batch", on_limit="downgrade: standard", trusted=True, per_person={"tokens_per_day": 5},
        )
        + "  expires: 2027-01-01\n"
    )  # fmt: skip
    assert policy.limits == Limits(600, 1, 3, 8)
    assert (policy.name, policy.digest, policy.tiers) == ("web", bytes.fromhex(DIGEST), ("standard", "pro"))
    assert (policy.is_batch, policy.downgrade, policy.is_trusted) == (True, "standard", True)
    assert policy.per_person == Limits(tokens_per_day=5)
    assert policy.expires == datetime(2027, 1, 1, tzinfo=UTC).timestamp()


def test_only_name_and_digest_are_required() -> None:
    (policy,) = parse(entry())
    assert (policy.limits, policy.tiers, policy.is_batch, policy.expires) == (Limits(), None, False, None)
    assert (policy.downgrade, policy.is_trusted, policy.per_person) == (None, False, None)


def test_list_without_keys_is_valid_and_means_that_no_key_is() -> None:
    assert parse("keys: []") == []


@pytest.mark.parametrize("value", ["downgrade: standard", " downgrade :  standard ", {"downgrade": "standard"}])
def test_on_limit_is_a_text_or_a_mapping(value: object) -> None:
    assert parse(entry(on_limit=value))[0].downgrade == "standard"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-01-01", datetime(2027, 1, 1, tzinfo=UTC)),
        ("'2027-01-01'", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2027-01-01T18:00:00+09:00", datetime(2027, 1, 1, 9, tzinfo=UTC)),
        ("2027-01-01 18:00:00", datetime(2027, 1, 1, 18, tzinfo=UTC)),
    ],
)
def test_end_is_a_date_or_a_time_in_utc_unless_it_says_otherwise(text: str, moment: datetime) -> None:
    assert parse(f"{entry()}  expires: {text}\n")[0].expires == moment.timestamp()


@pytest.mark.parametrize(
    "text", ["", "   \n", "# nothing yet\n", "[]", "keys:", "keys: {}", "web", "keys: [", "\0", "a: &a [*a]", "keys: x"]
)
def test_text_that_is_no_list_of_keys_is_refused(text: str) -> None:
    assert len(lines_of(text)) == 1


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute: got 0; expected a whole number of at least 1"),
        ({"tokens_per_minute": "many"}, "tokens_per_minute: got 'many'; expected a whole number"),
        ({"tokens_per_day": True}, "tokens_per_day: got true; expected a whole number"),
        ({"concurrency": 1.5}, "concurrency: got 1.5; expected a whole number"),
        ({"priority": "high"}, "priority: got 'high'; expected interactive or batch"),
        ({"expires": "soon"}, "expires: got 'soon'; expected a date such as 2027-01-01"),
        ({"expires": 20270101}, "expires: got 20270101; expected a date"),
        ({"expires": "9999-12-31T23:59:59-09:00"}, "expires: got '9999-12-31T23:59:59-'…; expected a date"),
        ({"expires": "0001-01-01T00:00:00+09:00"}, "expires: got '0001-01-01T00:00:00+'…; expected a date"),
        ({"tiers": []}, "tiers: got a list; expected a list of names of tiers"),
        ({"tiers": [1]}, "tiers: got a list; expected a list of names of tiers"),
        ({"trusted": "yes"}, "trusted: got 'yes'; expected true or false"),
        ({"on_limit": "refuse"}, "on_limit: got 'refuse'; expected \"downgrade: TIER\""),
        ({"on_limit": {"downgrade": 1}}, "on_limit: got a mapping; expected"),
        ({"on_limit": {"downgrade": " "}}, "on_limit: got a mapping; expected"),
        ({"per_person": {"tokens_per_day": 5}}, "per_person: expected `trusted: true` as well"),
        ({"trusted": True, "per_person": {}}, "per_person: expected at least one of requests_per_minute"),
        ({"trusted": True, "per_person": {"tokens": 5}}, "per_person.'tokens': unknown field; did you mean"),
        ({"trusted": True, "per_person": {"tokens_per_day": -1}}, "per_person.tokens_per_day: got -1; expected"),
        ({"trusted": True, "per_person": 5}, "per_person: got 5; expected limits"),
        ({"request_per_minute": 5}, "'request_per_minute': unknown field; did you mean 'requests_per_minute'?"),
        ({"key": "sk-secret"}, "'key': unknown field; the file has the sha256 of a key, never the key"),
    ],
)
def test_wrong_field_is_refused_in_one_line(fields: dict[str, Any], line: str) -> None:
    (found,) = lines_of(entry(**fields))
    assert found.startswith(f"keys[0] (web).{line}")


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in ("name", "sha256")])
def test_field_without_a_value_is_refused_since_it_would_mean_no_limit(field: str) -> None:
    """A file that is half written may end there."""
    (line,) = lines_of(f"{entry()}  {field}:\n")
    assert line == f"keys[0] (web).{field}: it is empty; expected a value, or an entry without the field"


def test_limit_of_a_person_without_a_value_is_refused() -> None:
    (line,) = lines_of(entry(trusted=True, per_person={"tokens_per_day": None}))
    assert line.startswith("keys[0] (web).per_person.tokens_per_day: it is empty")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"{entry()}  concurrency: 1\n  concurrency: 100\n", "'concurrency' (line 5)"),
        (f"{entry()}  sha256: '{'0' * 64}'\n", "'sha256' (line 4)"),  # the dash of the next entry is missing
        (f"{entry()}keys: []\n", "'keys' (line 4)"),
        (f"{entry()}  per_person: {{concurrency: 1, concurrency: 2}}\n", "'concurrency' (line 4)"),
    ],
)
def test_key_that_occurs_twice_is_refused_and_not_the_last_one_taken(text: str, key: str) -> None:
    (line,) = lines_of(text)
    assert line.startswith(f"{key}: it occurs twice;")


def test_date_that_does_not_exist_is_refused_with_its_field() -> None:
    (line,) = lines_of(f"{entry()}  expires: 2027-02-30\n")
    assert line.startswith("keys[0] (web).expires: got '2027-02-30'; expected a date")


def test_all_mistakes_are_reported_at_once_and_no_digest_or_key() -> None:
    document = {
        "keys": [
            {"name": "a b", "sha256": "sk-a-secret-key"},
            {"sha256": DIGEST, "concurrency": 0},
            "sk-another-secret-key-0123456789",
            {"name": "web", "sha256": DIGEST},
            {"name": "web", "sha256": sha256(b"x").hexdigest()},
            {"name": "other", "sha256": DIGEST.upper()},
        ],
        "kyes": [],
    }
    lines = lines_of(yaml.safe_dump(document))
    assert lines == (
        "'kyes': unknown key; expected: keys",
        "keys[0].name: got 'a b'; expected a name of at most 128 letters, digits and . _ : / @ + -",
        "keys[0].sha256: expected the 64 hex digits of a key's SHA-256, in quotes",
        "keys[1].name: missing",
        "keys[1].concurrency: got 0; expected a whole number of at least 1; without the field, there is no limit",
        "keys[2]: expected a mapping of fields",
        "web: the name occurs twice; expected a name for each key",
        "other: its sha256 is that of web; expected a key of its own",
    )


def test_syntax_error_names_the_line_and_quotes_nothing() -> None:
    (line,) = lines_of("keys:\n  - name: web\n    sha256: 'sk-secret\n  - [")
    assert line.startswith("it is not valid YAML (line ")
    assert "secret" not in line


# Many keys


def many(keys: int) -> str:
    entries = (f"- name: key-{number}\n  sha256: {number + 0xA000:064x}\n  tiers: [a, b]\n" for number in range(keys))
    return "keys:\n" + "".join(entries)


def test_no_garbage_is_collected_while_many_keys_are_read() -> None:
    """A collection stops all threads: for 0.6 s with 10,000 keys, while others answered requests."""
    collections: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    text = many(500)
    gc.collect()
    gc.callbacks.append(note)
    try:
        parse(text)
    finally:
        gc.callbacks.remove(note)
    assert collections.count("start") <= 1  # that of the policies, afterwards
    assert gc.isenabled()


def test_garbage_is_collected_again_after_a_file_that_is_refused() -> None:
    assert lines_of("keys: [5]")
    assert gc.isenabled()


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML is built without libyaml")
def test_many_keys_are_read_with_libyaml() -> None:
    """PyYAML's own parser took 8 s for 10,000 keys, in which every token of a stream could be 5 ms late."""
    text = many(300)
    assert_at_most(0.6, lambda: parse(text), yardstick=lambda: yaml.safe_load(text))
