"""An engine's own reason for a failure, reduced to what may be logged. Pure.

An engine's error text can repeat the prompt, a key or a path. So nothing of it is kept but runs of
words from a fixed list, and numbers between them, and nothing in quotes.
"""

import re

MAX_REASON = 200
"""Longest reason, in characters."""

_MAX_TEXT = 1000
_MIN_WORDS = 3

# Words that say that an engine failed. A run of words without one of them is not kept.
_TELLING = """
    aborted allocate allocated allocation backend busy cache crashed cuda cudnn died dumped engine gguf gpu hip
    hipblas initialize killed layout llama load loaded loading memory metal model nccl oom overloaded pending
    process resource resources rocm runner server sigabrt sigkill signal sigsegv terminated timed vram vulkan worker
    workers
"""
# Names that tell enough alone.
_NAMES = """
    AsyncEngineDeadError CUDA_ERROR_OUT_OF_MEMORY cudaMalloc EngineCore EngineDeadError EngineGenerateError
    GGML_ASSERT ggml_backend OutOfMemoryError
"""
_OTHER = """
    a abort above access again already an and any are assert at available be because been blocks broken buffer bus
    but by bytes call cannot capacity cause check communication compute connection context core could create dead
    deallocated details detected device did disk driver due encountered end eof error errored errors exceeded
    exception exist exit exited external fail failed failure fault fits for fragmentation free from full graph has
    have http illegal in inference insufficient internal invalid is issue it its key kv large layers left length
    limit limitations limits logs long longer loop lost max maximum may more multiple necessary needed needs new no
    not of offload on only or out pages parallel pinned please progress queue quota reached read ready requests
    required requires reserve reset responding response restart root running see seen segmentation session set shape
    shared side size skipped slots small space stack stacktrace start started starting state status still stopped
    stopping system tensor tensors than that the there this thread time timeout to too total trace tried trigger
    triggered try unable unavailable unexpected unexpectedly unknown unload use used value version violation wait
    waiting was which while will with within without write zero
"""
_NUMBER = r"-?\d{1,6}(?:\.\d{1,3})?(?:\s?[KMGT]i?B)?(?![\s:;,.()-]*\d)"
_SEPARATOR = r"[\s:;,.()]{0,4}(?:-\s)?"
_END = r"(?!\w|[-./@=\\]\w)"  # a part of a path, an address or a compound is not a word
_QUOTED = re.compile(r"""(?<!\w)(['"`]).*?(?:\1(?!\w)|$)""")


def _alternatives(*words: str) -> str:
    return "|".join(sorted({word for text in words for word in text.split()}, key=len, reverse=True))


_RUN = re.compile(
    rf"(?<![^\s(:])(?:(?:{_alternatives(_TELLING, _NAMES, _OTHER)}|{_NUMBER}){_END}{_SEPARATOR}){{1,60}}", re.IGNORECASE
)
_TELLING_WORD = re.compile(rf"(?<!\w)(?:{_alternatives(_TELLING)})(?!\w)", re.IGNORECASE)
_NAME = re.compile(rf"(?<!\w)(?:{_alternatives(_NAMES)})(?!\w)")


def engine_reason(text: str) -> str | None:
    """Return the loggable part of an engine's error text, None if it says nothing known.

    Gaps are marked with `…`. It is one line of printable ASCII with at most `MAX_REASON` characters.
    """
    plain = _QUOTED.sub("\0", re.sub(r"[^\x20-\x7e]+", " ", text[:_MAX_TEXT]))
    kept = ""
    for match in _RUN.finditer(plain):
        run = " ".join(match[0].split()).rstrip(" :;,.(/-")
        has_enough = len(re.findall(r"[A-Za-z]+", run)) >= _MIN_WORDS and _TELLING_WORD.search(run)
        if not (has_enough or _NAME.search(run)):
            continue
        if kept:
            kept += " … "
        kept += run
        if len(kept) > MAX_REASON:
            break
    return kept[:MAX_REASON] or None
