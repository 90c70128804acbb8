"""Tests of the child processes: input, crashes, limits, environment, and their end.

Covers: gateway/chat/image_child.py
"""

import asyncio
import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from gateway.chat import image_child, image_workers
from gateway.chat.image_structure import BadImage, kind_of
from gateway.chat.image_workers import ImageWorkers, Job
from tests.chat.child_samples import HANGING, Child, Children, Gate, changed, watched
from tests.chat.image_samples import CONVERTED, drawing, saved
from tests.fakes.running_gateway import until

GIF = CONVERTED["gif"][0]
TRANSPARENT = saved(Image.merge("RGBA", [Image.effect_noise((500, 400), 90)] * 4), "PNG")
"""Larger than a pipe's buffer."""
FLAT = saved(Image.new("P", (5000, 5000)), "GIF")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or needs SIGIO for pipes")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    return watched(monkeypatch)


@pytest.fixture
def workers() -> Iterator[ImageWorkers]:
    workers = ImageWorkers()
    yield workers
    workers.close()


def convert(workers: ImageWorkers, data: bytes = GIF, job: Job | None = None, pixels: int = 1) -> bytes:
    return bytes(workers.convert(data, pixels, job or Job()).data)


def of(child: Child, name: str) -> str:
    return Path(f"/proc/{child.pid}/{name}").read_text()


def test_child_is_reused(workers: ImageWorkers, children: Children) -> None:
    assert children.all == [], "children start when they are needed"
    results = {convert(workers) for _ in range(5)}
    assert [kind_of(result) for result in results] == ["png"]
    assert len(children.all) == 1
    assert repr(workers) == "<ImageWorkers 0 busy, 1 idle>"


def test_answer_has_pixels_and_cpu_time(workers: ImageWorkers) -> None:
    result = workers.convert(saved(Image.new("P", (2000, 2000)), "GIF"), 25_000_000, Job())
    assert result.pixels == 4_000_000
    assert 0.005 < result.seconds < 10


async def test_child_that_starts_late_loses_no_input(workers: ImageWorkers, children: Children, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    children.code = gate.late_start
    assert len(TRANSPARENT) > 300_000
    task = asyncio.create_task(asyncio.to_thread(convert, workers, TRANSPARENT))
    await until(lambda: bool(children.all))
    stdin = children.all[0].stdin
    assert stdin is not None

    def unread() -> int:
        return int(struct.unpack("i", fcntl.ioctl(stdin, termios.FIONREAD, bytes(4)))[0])

    await until(lambda: unread() > 1 << 14)  # what a pipe holds, at most 64 KiB; the rest has to wait
    assert unread() < len(TRANSPARENT) / 2
    (await asyncio.to_thread(gate.reached)).close()
    assert kind_of(await task) == "png"


def test_child_killed_while_idle_is_replaced(workers: ImageWorkers, children: Children) -> None:
    convert(workers)
    children.all[0].kill()
    assert convert(workers)
    assert len(children.all) == 2


def test_child_killed_while_idle_is_not_an_attempt(workers: ImageWorkers, children: Children) -> None:
    convert(workers)
    children.all[0].kill()
    children.all[0].wait()
    children.codes = [f"import os; os.kill(os.getpid(), {signal.SIGSEGV})"]
    assert convert(workers)
    assert len(children.all) == 3


async def test_image_of_a_child_killed_at_work_goes_to_a_fresh_one(
    workers: ImageWorkers, children: Children, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    children.codes = [gate.long_job, None]
    task = asyncio.create_task(asyncio.to_thread(convert, workers))
    go_on = await asyncio.to_thread(gate.reached)
    children.all[0].kill()
    assert kind_of(await task) == "png"
    go_on.close()
    assert len(children.all) == 2
    assert convert(workers)
    assert len(children.all) == 2


def test_image_that_kills_two_children_is_rejected(workers: ImageWorkers, children: Children) -> None:
    children.codes = [f"import os; os.kill(os.getpid(), {signal.SIGSEGV})"] * 2
    with pytest.raises(BadImage, match="too much time or memory"):
        convert(workers)
    assert len(children.all) == 2
    assert convert(workers), "the next image is not affected"


@pytest.mark.parametrize("answer", ["b'x'", "(b'\\xff' * 25)", "b''"])
def test_child_that_answers_nonsense_is_replaced(workers: ImageWorkers, children: Children, answer: str) -> None:
    code = f"import os, sys; sys.stdin.buffer.read(8); sys.stdout.buffer.write({answer}); sys.stdout.flush(); "
    children.codes = [f"{code}os.close(1); {HANGING}", None]
    assert convert(workers)
    assert len(children.all) == 2
    assert children.all[0].returncode == -signal.SIGKILL


def test_error_of_the_module_is_not_blamed_on_the_image(workers: ImageWorkers, children: Children) -> None:
    children.code = changed(("        parsed = begin(data)", "        raise KeyError('mistake')"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mistake"):
            convert(workers)
    assert len(children.all) == 1


@pytest.mark.parametrize("data", [GIF, TRANSPARENT])
def test_child_that_hangs_is_killed_at_the_deadline(
    workers: ImageWorkers, children: Children, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(image_workers, "JOB_SECONDS", 0.05)
    children.codes = [HANGING]
    with pytest.raises(image_workers.OutOfTime):
        convert(workers, data)
    assert children.alive == []
    monkeypatch.undo()
    assert convert(workers)


def test_deadline_grows_with_the_image(workers: ImageWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    class Timer(threading.Timer):
        def __init__(self, interval: float, *args: object) -> None:
            limits.append(interval)
            super().__init__(interval, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(image_workers.threading, "Timer", Timer)
    convert(workers)
    convert(workers, FLAT, pixels=25_000_000)
    assert limits == [pytest.approx(10, abs=0.1), pytest.approx(20)]


async def test_job_that_ends_kills_its_child(workers: ImageWorkers, children: Children, tmp_path: Path) -> None:
    gate, job = Gate(tmp_path), Job()
    children.codes = [gate.long_job]
    task = asyncio.create_task(asyncio.to_thread(convert, workers, GIF, job))
    go_on = await asyncio.to_thread(gate.reached)
    job.end()
    with pytest.raises(BadImage, match="no longer needed"):
        await task
    go_on.close()
    assert children.alive == []
    assert repr(workers) == "<ImageWorkers 0 busy, 0 idle>"


def test_job_that_ended_before_its_turn_starts_nothing(workers: ImageWorkers, children: Children) -> None:
    job = Job()
    job.end()
    with pytest.raises(BadImage, match="no longer needed"):
        convert(workers, GIF, job)
    assert children.all == []


def test_job_that_ends_afterwards_leaves_the_child_alone(workers: ImageWorkers, children: Children) -> None:
    job = Job()
    convert(workers, GIF, job)
    job.end()
    convert(workers)
    assert len(children.all) == 1


def test_child_is_replaced_after_many_images(
    workers: ImageWorkers, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_workers, "JOBS_PER_CHILD", 3)
    for _ in range(7):
        convert(workers)
    assert len(children.all) == 3
    assert len(children.alive) == 1


def test_child_is_replaced_after_a_very_large_image(workers: ImageWorkers, children: Children) -> None:
    convert(workers, FLAT, pixels=25_000_000)
    assert children.alive == []


def test_limit_of_cpu_time_counts_for_each_image(workers: ImageWorkers, children: Children) -> None:
    children.code = changed(("CPU_SECONDS = 15", "CPU_SECONDS = 0.15"))
    noise = saved(Image.effect_noise((300, 300), 90), "GIF")
    total = 0.0
    while total < 0.3:
        total += workers.convert(noise, 1, Job()).seconds
    assert len(children.all) == 1, "a child may use more in total"
    with pytest.raises(BadImage, match="too long"):
        convert(workers, FLAT)
    assert len(children.all) == 1, "such an image is not tried again"
    assert children.all[0].returncode == -signal.SIGPROF
    assert convert(workers)


def test_memory_of_a_child_is_bounded(workers: ImageWorkers, children: Children) -> None:
    children.code = changed(("MEMORY = 2 << 30", "MEMORY = 128 << 20"))
    large = saved(Image.new("P", (7900, 7900)), "GIF")
    with pytest.raises(BadImage, match="too much memory"):
        convert(workers, large)
    assert convert(workers)
    assert len(children.all) == 1


@on_linux
def test_child_has_limits_and_a_lower_priority(workers: ImageWorkers, children: Children) -> None:
    convert(workers)
    limits = {line[:26].strip(): line[26:].split()[:2] for line in of(children.all[0], "limits").splitlines()}
    assert limits["Max address space"] == [str(2 << 30)] * 2
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max file size"] == ["0", "0"]
    assert os.getpriority(os.PRIO_PROCESS, children.all[0].pid) >= os.getpriority(os.PRIO_PROCESS, 0) + 10 or (
        os.getpriority(os.PRIO_PROCESS, children.all[0].pid) == 19
    )


@on_linux
def test_child_has_nothing_of_the_gateway(
    workers: ImageWorkers, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No secret of the environment or command line, no open socket, and an interpreter of its own."""
    monkeypatch.setenv("GATEWAY_API_KEYS", "sk-secret")
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    convert(workers)
    child = children.all[0]
    os.close(read_end)
    os.close(write_end)
    assert of(child, "environ") == ""
    assert "secret" not in of(child, "cmdline")
    assert of(child, "cmdline").split("\0")[1] == "-I", "not even the current folder is on its path"
    assert image_child.__file__ in of(child, "cmdline")
    assert sorted(path.name for path in Path(f"/proc/{child.pid}/fd").iterdir()) == ["0", "1", "2"]


def test_close_leaves_no_idle_child(children: Children) -> None:
    workers = ImageWorkers()
    convert(workers)
    workers.close()
    assert children.alive == []
    with pytest.raises(BadImage):
        convert(workers)
    assert len(children.all) == 1, "none is started afterwards"


async def test_close_leaves_no_busy_child(children: Children, tmp_path: Path) -> None:
    workers, gate = ImageWorkers(), Gate(tmp_path)
    children.code = gate.long_job
    task = asyncio.create_task(asyncio.to_thread(convert, workers))
    go_on = await asyncio.to_thread(gate.reached)
    workers.close()
    assert children.alive == []
    with pytest.raises(BadImage):
        await task
    go_on.close()
    assert len(children.all) == 1


def test_child_whose_job_ends_after_close_is_not_kept(children: Children) -> None:
    workers = ImageWorkers()
    child = workers._take(Job())
    workers.close()
    workers._put_back(child, is_reusable=True)
    assert repr(workers) == "<ImageWorkers 0 busy, 0 idle>"


def test_interrupt_in_the_terminal_is_left_to_the_gateway(workers: ImageWorkers, children: Children) -> None:
    convert(workers)
    children.all[0].send_signal(signal.SIGINT)
    assert convert(workers)
    assert len(children.all) == 1


def test_child_that_writes_much_to_standard_error_does_not_hang(workers: ImageWorkers, children: Children) -> None:
    noisy = (
        "        try: os.write(2, bytes(10 << 20))\n        except BlockingIOError: pass\n        parsed = begin(data)"
    )
    children.code = changed(("        parsed = begin(data)", noisy))
    for _ in range(3):
        assert convert(workers)
    assert len(children.all) == 1


def test_images_in_several_threads_do_not_mix(workers: ImageWorkers, children: Children) -> None:
    samples = [saved(drawing((40 + number, 40)).quantize(16), "GIF") for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda data: convert(workers, data), samples * 10))
    widths = [int.from_bytes(result[16:20]) for result in results]
    assert widths == [40 + number for number in range(8)] * 10
    assert len(children.all) <= 4


def orphan(code: str | None = None) -> Child:
    """Return a child whose gateway is this test."""
    start = ["-c", code] if code is not None else [image_child.__file__]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-I", *start, *image_workers.FOLDERS], stdin=pipe, stdout=pipe, env={}, bufsize=0
    )


def test_idle_child_ends_with_the_gateway() -> None:
    with orphan() as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(10) == 0


@pytest.mark.parametrize("sent", [b"\0\0", image_child.REQUEST.pack(1000, 0) + b"half"])
def test_child_whose_gateway_ended_halfway_through_an_image_ends(sent: bytes) -> None:
    with orphan() as child:
        assert child.stdin is not None
        child.stdin.write(sent)
        child.stdin.close()
        assert child.wait(10) == 0


@on_linux
def test_child_at_work_ends_with_the_gateway(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with orphan(gate.long_job) as child:
        assert child.stdin is not None
        child.stdin.write(image_child.REQUEST.pack(len(GIF), 0) + GIF)
        with gate.reached():
            child.stdin.close()
            assert child.wait(10) == -signal.SIGIO


def test_time_of_an_image_ends_with_it(workers: ImageWorkers, children: Children) -> None:
    children.code = changed(("ORPHAN_SECONDS = 60", "ORPHAN_SECONDS = 2"))
    convert(workers)
    with pytest.raises(subprocess.TimeoutExpired):  # an idle child lives on
        children.all[0].wait(2.2)


def test_child_at_work_ends_by_itself(tmp_path: Path) -> None:
    """Should the kernel not report the end of the gateway."""
    gate = Gate(tmp_path)
    code = gate.long_job.replace("ORPHAN_SECONDS = 60", "ORPHAN_SECONDS = 0.05")
    with orphan(code) as child:
        assert child.stdin is not None
        child.stdin.write(image_child.REQUEST.pack(len(GIF), 0) + GIF)
        with gate.reached():
            assert child.wait(10) == -signal.SIGALRM
