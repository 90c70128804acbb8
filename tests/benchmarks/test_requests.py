"""Requests of the cost benchmark."""

import base64
import io
import json

import pytest
from PIL import Image

from benchmarks import requests


def test_request_has_its_length_and_requests_usage() -> None:
    head, _, body = requests.chat("standard", max_tokens=7, stream=True).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    parsed = json.loads(body)
    assert (parsed["model"], parsed["max_tokens"], parsed["stream_options"]) == ("standard", 7, {"include_usage": True})


def test_image_is_a_valid_png_of_the_requested_size() -> None:
    png = requests.noise_png(200_000)
    Image.open(io.BytesIO(png)).load()
    assert len(base64.b64encode(png)) == pytest.approx(200_000, rel=0.02)
