"""Cost per user, computed from what a machine costs and how many users it serves at once. Pure."""

from msgspec import Struct

HOURS_PER_MONTH = 365.25 * 24 / 12


class Machine(Struct, frozen=True):
    """Price of a machine, its years of use, its power in watts, and the price of a kWh; one currency."""

    price: float
    years: float
    watts: float
    kwh_price: float

    @property
    def monthly(self) -> float:
        """Cost of a month: depreciation in equal parts, and power around the clock."""
        return self.price / (self.years * 12) + self.watts / 1000 * HOURS_PER_MONTH * self.kwh_price


class Cost(Struct, frozen=True):
    """Cost of one month, and of one user in it. `share` compares it with the machine before, in percent.

    None: there is nothing to compare it with, or no cost without the inputs.
    """

    users: int
    monthly: float | None
    per_user: float | None
    share: float | None


def cost_of(users: int, machine: Machine | None, users_before: int | None = None) -> Cost | None:
    """Return the cost per user at once; None without users, or without anything to compute.

    With the same machine before and after, the share is the ratio of the users alone.
    """
    if users < 1 or (machine is None and not users_before):
        return None
    monthly = None if machine is None else machine.monthly
    share = None if not users_before else users_before / users * 100
    return Cost(users, monthly, None if monthly is None else monthly / users, share)
