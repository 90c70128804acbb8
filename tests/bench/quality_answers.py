"""A right and a wrong answer for each task that comes with the package."""

RIGHT: dict[str, str] = {
    "merge-intervals": '''```python
def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge intervals that overlap or touch, and return them sorted as tuples."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
```''',
    "parse-duration": '''Here it is:

```python
import re

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> int:
    """Return the seconds of a duration such as "1h30m"."""
    if not re.fullmatch(r"(?:\\d+[dhms])+", text):
        raise ValueError(f"not a duration: {text!r}")
    parts = re.findall(r"(\\d+)([dhms])", text)
    return sum(int(number) * SECONDS[unit] for number, unit in parts)
```''',
    "review-user-lookup": """1. **SQL injection.** The name is concatenated into the query, so a caller can run any SQL.
   Use a parameterized query with a placeholder.
2. **Mutable default argument.** `seen=[]` is shared between calls, so results accumulate. Use `seen=None`.
3. **Bare except.** It swallows every error, also KeyboardInterrupt. Catch `sqlite3.Error` and log it.
4. **Resource leak.** The connection is never closed. Use a context manager such as `contextlib.closing`.""",
    "review-as-json": """{"defects": [{"line": 3, "problem": "the loop starts at 1 and skips the first element"},
{"line": 5, "problem": "division by zero for an empty list"}]}""",
    "queue-for-one-gpu": """## Admission
A semaphore permits four concurrent requests; that is what the server answers at once. The others are queued in
order of arrival, and a client that leaves is removed at once. Each request carries a deadline of 120 seconds.

## Overload
The queue is bounded. At 20 requests the expected wait exceeds the patience of the clients, so one more is refused
with 503 and Retry-After, computed from the median duration and the number that are queued.

## Retries
Clients retry with exponential backoff and jitter, and with a key that makes the request idempotent, so that a
duplicate joins the one that is already queued instead of doing the work twice.

## Failures of the GPU server
A health check every five seconds and a circuit breaker keep requests in the queue while the server is down. A
request that has not produced anything yet is tried once more.

## Observability
Metrics for queue length, queue time, duration and refusals as histograms; a dashboard shows p95 and p99, and an
alert fires when the queue has been full for five minutes.""",
    "move-without-downtime": """1. Put a gateway in front of both servers that translates between the two APIs.
   The route is a feature flag.
2. Mirror a sample of the requests to B, without using its answers, and compare quality on golden prompts.
3. Compare p50, p95 and p99 latency under the load of production.
4. Move 1 % of the conversations as a canary, then 10 %, 50 % and 100 %, a day each.
5. Stop if the error rate exceeds that of A by half a percent point or p95 latency by a fifth.
6. Rollback is the flag: all traffic returns to A within a second, and A stays warm for two weeks. Tell the owners of
   the clients before each of the steps, and keep the measured figures of each step together with the decision.""",
    "binary-search": '''When two values are left, `low = middle` does not advance, so the loop runs forever.

```python
def find(values: list[int], target: int) -> int:
    """Return the index of target in the sorted values, or -1."""
    low, high = 0, len(values) - 1
    while low <= high:
        middle = (low + high) // 2
        if values[middle] == target:
            return middle
        if values[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1
```''',
    "changed-during-iteration": '''Entries are deleted while the loop iterates over the same dictionary.

```python
def drop_expired(sessions: dict[str, float], now: float) -> int:
    """Remove the sessions that have expired and return their number."""
    expired = [key for key, end in sessions.items() if end <= now]
    for key in expired:
        del sessions[key]
    return len(expired)
```''',
    "korean-summary": "한 디자인 회사의 이미지 분석 서버는 1장에 51초가 걸렸지만 5장을 동시에 보내면 397초가 "
    "걸렸습니다. "
    "이는 순서대로 처리할 때의 255초보다 55% 느린 결과입니다. 회사는 한 장씩 처리하도록 "
    "바꾸고 다음 달에 다른 서버를 시험할 예정입니다.",
    "korean-extraction": '{"이름": "김민서", "수량": 3, "날짜": "2026-03-05", "배송": "부산"}',
}

WRONG: dict[str, str] = {
    "merge-intervals": "def merge_intervals(intervals=[]):\n    x = 1\n    return intervals",
    "parse-duration": "You can use the datetime module for that.",
    "review-user-lookup": "Looks good to me, ship it!",
    "review-as-json": "The function is fine.",
    "queue-for-one-gpu": "Buy a second GPU.",
    "move-without-downtime": "Just do it at night.",
    "binary-search": "```python\ndef find(values, target):\n    return values.index(target)\n```",
    "changed-during-iteration": "```\ndef drop_expired(sessions, now):\n    for key in sessions:\n"
    "        del sessions[key]\n```",
    "korean-summary": "The company has a server, and 服务器 is slow.",
    "korean-extraction": "이름은 김민서이고 수량은 세 개입니다.",
}
