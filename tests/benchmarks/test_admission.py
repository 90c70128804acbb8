"""The admission benchmark, in small runs."""

from benchmarks import admission


def test_step_has_a_measurable_cost() -> None:
    assert 0 < admission.step_cost(admission.FEW) < 10_000


async def test_burst_through_the_gateway_is_served_completely_and_sequentially() -> None:
    async with (
        admission.running(0.002, admission.SEED_SLOWDOWN) as bench,
        bench.client(True) as direct,
        bench.client(False) as through,
    ):
        images = [admission.image_request(number) for number in range(4)]
        alone = await bench.send(direct, images[:1], 1)
        outcome = await bench.send(through, images, 4)
        assert (alone.failures, outcome.failures, len(outcome.each)) == (0, 0, 4)
        assert outcome.total >= 4 * admission.IMAGE_SECONDS
        assert await bench.limits() == {admission.VISION: 1}
