"""Client authentication."""

from hashlib import sha256

import pytest

from gateway.api.auth import ANYONE, ApiKeys, bearer
from gateway.errors import InvalidApiKey
from tests.keys.fakes import Clocks, accounts, policy

KEY = "sk-test-one"
KEYS = ApiKeys([KEY, "sk-test-zwei-ü"])


def headers(*values: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), *((b"authorization", value) for value in values)]


def test_gateway_without_keys_accepts_any_key_or_none() -> None:
    keys = ApiKeys([])
    assert keys.is_open
    assert keys.identify(headers()) is ANYONE
    assert keys.identify(headers(b"Bearer whatever")) is ANYONE


def test_caller_id_is_eight_digits_of_the_digest_and_no_key_is_stored() -> None:
    caller = KEYS.identify(headers(b"Bearer " + KEY.encode()))
    assert caller.key_id == sha256(KEY.encode()).hexdigest()[:8]
    assert KEY not in repr(vars(KEYS))


@pytest.mark.parametrize(
    "value", [b"Bearer sk-test-one", b"bearer sk-test-one", b"BEARER   sk-test-one  ", "Bearer sk-test-zwei-ü".encode()]
)
def test_scheme_is_case_insensitive(value: bytes) -> None:
    assert KEYS.identify(headers(value)).key_id


@pytest.mark.parametrize(
    "values",
    [
        (),
        (b"",),
        (b"Bearer",),
        (b"Bearer ",),
        (b"sk-test-one",),
        (b"Basic sk-test-one",),
        (b"Bearer sk-test-on",),
        (b"Bearer sk-test-one x",),
        (b"Bearer SK-TEST-ONE",),
        (b"Bearer sk-test-one", b"Bearer sk-test-one"),
        (b"Bearer \xff\xfe",),
    ],
    ids=[
        "no header",
        "empty header",
        "no token",
        "empty token",
        "no scheme",
        "Basic",
        "beginning of a key",
        "key and more",
        "key in other case",
        "two headers",
        "not UTF-8",
    ],
)
def test_missing_or_wrong_key_is_refused(values: tuple[bytes, ...]) -> None:
    with pytest.raises(InvalidApiKey):
        KEYS.identify(headers(*values))


@pytest.mark.parametrize("name", [b"x-api-key", b"api-key"])
def test_key_of_anthropics_and_azures_clients_counts(name: bytes) -> None:
    expected = KEYS.identify(headers(b"Bearer " + KEY.encode()))
    for value in (KEY.encode(), b" " + KEY.encode() + b" "):
        given = [(b"host", b"x"), (name, value)]
        assert KEYS.identify(given) is KEYS.identify(given, dict(given)) is expected


@pytest.mark.parametrize("others", [(b"Basic eDp5",), (b"",), (b"Bearer ",), (b"Bearer " + KEY.encode(),)])
def test_same_key_twice_and_headers_without_a_key_are_no_conflict(others: tuple[bytes, ...]) -> None:
    given = [*headers(*others), (b"x-api-key", KEY.encode()), (b"api-key", b"")]
    assert KEYS.identify(given).key_id == KEYS.identify(given, dict(given)).key_id


@pytest.mark.parametrize(
    "more",
    [
        [(b"x-api-key", b"sk-other")],
        [(b"api-key", b"sk-other")],
        [(b"x-api-key", KEY.encode()), (b"x-api-key", KEY.encode())],
        [(b"x-api-key", KEY.encode()), (b"api-key", "sk-test-zwei-ü".encode())],
    ],
    ids=["two keys", "two keys of Azure", "header twice", "two valid keys"],
)
@pytest.mark.parametrize("authorization", [(b"Bearer " + KEY.encode(),), (b"Basic eDp5",)])
def test_ambiguous_key_is_refused(more: list[tuple[bytes, bytes]], authorization: tuple[bytes, ...]) -> None:
    given = headers(*authorization) + more
    for fields in (None, dict(given)):
        with pytest.raises(InvalidApiKey):
            KEYS.identify(given, fields)


def test_two_authorization_headers_have_no_token() -> None:
    assert bearer(headers(b"Bearer a", b"Bearer b")) is None


def test_note_of_a_caller_is_another_one_after_the_keys_have_changed() -> None:
    keys = ApiKeys([KEY])
    notes = [keys.note]
    for changed in (["another"], [KEY]):
        keys.change(changed)
        notes.append(keys.note)
    assert len(set(notes)) == 3


def test_caller_stays_the_same_as_long_as_its_account_does() -> None:
    found = accounts(Clocks(), [policy("web"), policy("gone")])
    keys = ApiKeys([], found)
    before = keys.identify(headers(b"Bearer web"))
    found.change([policy("web", concurrency=3), policy("new")], lambda name: name)
    assert keys.identify(headers(b"Bearer web")) is before
    assert keys.identify(headers(b"Bearer new")).account is found.named("new")
    with pytest.raises(InvalidApiKey):
        keys.identify(headers(b"Bearer gone"))
    found.change([policy("new")], lambda name: name)
    found.change([policy("new"), policy("web")], lambda name: name)
    assert keys.identify(headers(b"Bearer web")).account is found.named("web") is not before.account
