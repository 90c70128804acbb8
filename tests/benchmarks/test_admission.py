"""The bench of the waiting line runs, in small."""

from benchmarks import admission


def test_steps_are_measured_with_few_and_with_many() -> None:
    assert 0 < admission.step_cost(admission.FEW) < 10_000


async def test_crowd_through_the_gateway_is_served_whole_and_in_a_row() -> None:
    async with (
        admission.running(0.002, admission.SEED_SLOWDOWN) as bench,
        bench.client(True) as straight,
        bench.client(False) as through,
    ):
        images = [admission.image_request(number) for number in range(4)]
        alone = await bench.send(straight, images[:1], 1)
        outcome = await bench.send(through, images, 4)
        assert (alone.failures, outcome.failures, len(outcome.each)) == (0, 0, 4)
        assert outcome.total >= 4 * admission.IMAGE_SECONDS
        assert await bench.limits() == {admission.VISION: 1}
