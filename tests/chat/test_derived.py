"""Attributes of a frozen struct that are computed once."""

from msgspec import Struct, structs

from gateway.chat.derived import derived

computed: list[int] = []


class Number(Struct, frozen=True, dict=True):
    value: int

    @derived
    def square(self) -> int:
        """The square."""
        computed.append(self.value)
        return self.value**2


def test_it_is_computed_when_it_is_first_read_and_only_then() -> None:
    computed.clear()
    number = Number(3)
    assert not computed
    assert (number.square, number.square, computed) == (9, 9, [3])


def test_a_copy_with_other_fields_computes_its_own() -> None:
    number = Number(3)
    assert number.square == 9
    assert structs.replace(number, value=4).square == 16


def test_equality_and_the_class_do_not_see_the_value() -> None:
    read, other = Number(3), Number(3)
    assert read.square == 9
    assert read == other
    assert Number.square.__doc__ == "The square."
