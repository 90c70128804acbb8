"""Fixtures of the tests of images."""

from collections.abc import Iterator

import pytest

from gateway.chat.images import ImageNormalizer


@pytest.fixture(scope="module")
def images() -> Iterator[ImageNormalizer]:
    images = ImageNormalizer()
    yield images
    images.close()
