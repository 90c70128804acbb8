"""Child process that runs a model's Python code and its tests under limits; started by path, imports the stdlib only.

It reads a JSON job from standard input (`code`, `tests`, `seconds`, `memory_bytes`, `folder`) and
writes one JSON line: the outcome of each test and the guards that held. What the code prints is
dropped. Each guard that the system has is set before the code runs:

- resource limits (setrlimit(2)): processor time, memory, file size, open files;
- Landlock (landlock(7), Linux 5.13): files are read below the interpreter's own folders and written
  below `folder` only; from ABI 4 no TCP, from ABI 6 no signal to another process;
- seccomp (seccomp(2), x86-64 and arm64): no socket, no program, no process, no signal;
- an audit hook (PEP 578) that refuses the same, for systems without these.
"""

import contextlib
import ctypes
import json
import os
import platform
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_EVERY_ACCESS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_SPECIAL_FILES = 1 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15  # execute, make devices and sockets, ioctl on devices

# audit architecture, numbers to refuse, clone, clone3 (linux/audit.h, the kernel's syscall tables)
_SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,
        (41, 42, 49, 57, 58, 59, 62, 101, 165, 200, 234, 272, 308, 310, 311, 321, 322, 424, 425, 434),
        56,
    ),
    "aarch64": (
        0xC00000B7,
        (198, 200, 203, 221, 129, 117, 40, 130, 131, 97, 268, 270, 271, 280, 281, 424, 425, 434),
        220,
    ),
}
_CLONE3, _CLONE_THREAD = 435, 0x10000
_REFUSE, _NO_SUCH_CALL, _ALLOW = 0x00050001, 0x00050026, 0x7FFF0000  # EPERM, ENOSYS

_REFUSED_EVENTS = (
    *("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen", "pty.spawn"),
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill", "os.killpg"),
    *("ctypes.dlopen", "ctypes.dlsym"),
)
_PATH_EVENTS = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    "shutil.rmtree",
)


def _limit_resources(seconds: float, memory_bytes: int) -> None:
    for kind, limit in (
        ("RLIMIT_CPU", int(seconds) + 1),
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_FSIZE", 1 << 20),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
    ):
        _limit(kind, limit)


def _limit(kind: str, limit: int) -> None:
    # A system may lack a limit, or have a lower one already.
    with contextlib.suppress(AttributeError, ValueError, OSError):
        resource.setrlimit(getattr(resource, kind), (limit, limit))


def _system_call(number: int, *arguments: Any) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))


def _restrict_files(folder: str) -> bool:
    version = _system_call(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    every = _EVERY_ACCESS[min(version, 5)]
    fields = [every] + ([3] if version >= 4 else []) + ([3] if version >= 6 else [])
    rules = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _system_call(_CREATE_RULESET, ctypes.c_char_p(rules), len(rules), 0)
    if ruleset < 0:
        return False
    code = {sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"}
    for access, paths in ((_READ_FILE | _READ_DIR, code), (every & ~_SPECIAL_FILES, {folder})):
        for path in paths:
            if not Path(path).exists() or path == "/":
                continue
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = access if Path(path).is_dir() else access & _READ_FILE
            rule = struct.pack("=Qi", allowed, descriptor)
            _system_call(_ADD_RULE, ruleset, 1, ctypes.c_char_p(rule), 0)
            os.close(descriptor)
    held = _no_new_privileges() and _system_call(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return held


def _no_new_privileges() -> bool:
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0)


def _filter_program(architecture: int, refused: tuple[int, ...], clone: int) -> bytes:
    """Return a classic BPF program over `struct seccomp_data` (linux/filter.h)."""

    def load(offset: int) -> tuple[int, int, int, int]:
        return (0x20, 0, 0, offset)

    def jump(code: int, value: int, yes: int, no: int) -> tuple[int, int, int, int]:
        return (code, yes, no, value)

    equal, at_least, any_bit = 0x15, 0x35, 0x45
    body = [load(4), jump(equal, architecture, 1, 0), (0x06, 0, 0, _REFUSE), load(0)]
    body += [jump(at_least, 0x40000000, 0, 1), (0x06, 0, 0, _REFUSE)]  # the x32 numbers
    body += [jump(equal, _CLONE3, 0, 1), (0x06, 0, 0, _NO_SUCH_CALL)]  # its flags are out of reach: use clone
    for number in refused:
        body += [jump(equal, number, 0, 1), (0x06, 0, 0, _REFUSE)]
    body += [jump(equal, clone, 0, 3), load(16), jump(any_bit, _CLONE_THREAD, 1, 0), (0x06, 0, 0, _REFUSE)]
    body.append((0x06, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in body)


def _filter_system_calls() -> bool:
    known = _SYSTEM_CALLS.get(platform.machine())
    if known is None or sys.platform != "linux":
        return False
    program = _filter_program(*known)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)))
    library = ctypes.CDLL(None, use_errno=True)
    return _no_new_privileges() and library.prctl(_SET_SECCOMP, _FILTER_MODE, header, 0, 0) == 0


def _audit(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    realpath, inside = os.path.realpath, folder + os.sep
    write = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def check_path(path: Any) -> None:
        if isinstance(path, int):
            return
        if not (realpath(os.fsdecode(path)) + os.sep).startswith(inside):
            raise PermissionError("outside the temporary folder")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _REFUSED_EVENTS:
            raise PermissionError(f"{event} is not allowed here")
        if (event == "open" and arguments[2] & write) or event in _PATH_EVENTS:
            check_path(arguments[0])

    return hook


def _guards(job: Mapping[str, Any]) -> dict[str, bool]:
    if resource is not None:
        _limit_resources(job["seconds"], job["memory_bytes"])
    guards = {"landlock": False, "seccomp": False}
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            guards["landlock"] = _restrict_files(job["folder"])
        with contextlib.suppress(OSError, AttributeError):
            guards["seccomp"] = _filter_system_calls()
    if not guards["seccomp"]:
        _limit("RLIMIT_NPROC", 0)  # no threads either, which seccomp can tell from processes
    sys.addaudithook(_audit(job["folder"]))
    return guards


def _run(job: Mapping[str, Any]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "answer"}  # not "__main__": only definitions are wanted
    try:
        exec(compile(job["code"], "answer", "exec"), names)  # noqa: S102  # it is what this process is for
    except BaseException as error:  # SystemExit of the code too
        return {"results": [False] * len(job["tests"]), "error": type(error).__name__}
    results, error_name = [], None
    for test in job["tests"]:
        try:
            results.append(bool(eval(compile(test, "test", "eval"), names)))  # noqa: S307
        except BaseException as error:
            results.append(False)
            error_name = type(error).__name__
    return {"results": results, "error": error_name}


def main() -> None:
    """Run the job of standard input."""
    job = json.loads(sys.stdin.buffer.read())
    job["folder"] = str(Path(job["folder"]).resolve())
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    guards = _guards(job)
    outcome = json.dumps({**_run(job), "guards": guards, "token": job["token"]}).encode()
    os.write(report, outcome)
    os._exit(0)  # threads that the code left behind do not keep it


if __name__ == "__main__":
    main()
