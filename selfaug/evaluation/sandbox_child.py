"""Runs one untrusted program inside the walls that `sandbox.py` asks for. A script, not a module to import.

Standard library only, and started by path, so that it needs nothing of the package. On stdin it gets a secret and
the program; on stdout it answers the secret and a verdict. Four walls, all of which bind the process
for good and need no privilege:

* seccomp: of the kernel's calls only those in CALLS answer, which compute and read and write files. There is no
  other process, no thread, no socket, no signal to anybody else, no change of rights, no new limits. An allow-list: a
  call that nobody thought of is refused.
* Landlock: files can be read where Python lives, and read, written, made and deleted in the working folder. Not even
  the owner of a file gets at it elsewhere.
* limits of memory, processor time, file size and open files.
* no capabilities: root inside is nobody.
"""

import ctypes
import os
import resource
import struct
import sys
import types
from typing import Any, NoReturn

FILE_BYTES = 8 << 20
OPEN_FILES = 32

# Calls that answer, whatever their arguments: name, number on x86_64, number on aarch64 ("-": there is none).
CALLS = """
    read 0 63         write 1 64        readv 19 65         writev 20 66      pread64 17 67     pwrite64 18 68
    close 3 57        close_range 436 436  lseek 8 62       ftruncate 77 46   fsync 74 82       fdatasync 75 83
    stat 4 -          fstat 5 80        lstat 6 -           newfstatat 262 79 statx 332 291     access 21 -
    faccessat 269 48  faccessat2 439 439  readlink 89 -     readlinkat 267 78 getdents 78 -     getdents64 217 61
    getcwd 79 17      chdir 80 49       fchdir 81 50        dup 32 23         dup2 33 -         dup3 292 24
    pipe 22 -         pipe2 293 59      select 23 -         pselect6 270 72   poll 7 -          ppoll 271 73
    rename 82 -       renameat 264 38   renameat2 316 276   unlink 87 -       unlinkat 263 35
    mmap 9 222        mprotect 10 226   munmap 11 215       mremap 25 216     madvise 28 233    brk 12 214
    futex 202 98      rseq 334 293      sched_yield 24 124  sched_getaffinity 204 123           getrandom 318 278
    rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  rt_sigtimedwait 128 137  rt_sigsuspend 130 133
    sigaltstack 131 132  pause 34 -     alarm 37 -          getitimer 36 102  setitimer 38 103
    nanosleep 35 101  clock_nanosleep 230 115  clock_gettime 228 113  clock_getres 229 114  gettimeofday 96 169
    time 201 -        times 100 153     getrusage 98 165    sysinfo 99 179    uname 63 160      restart_syscall 219 128
    getpid 39 172     getppid 110 173   gettid 186 178      getuid 102 174    geteuid 107 175   getgid 104 176
    getegid 108 177   exit 60 93        exit_group 231 94
"""
# Calls that answer only where (argument & mask) is one of the values: name, its numbers, position of the argument.
_READS_OR_TRUNCATES_WHAT_IT_WRITES = [0, 1, 2, 3, os.O_TRUNC | 1, os.O_TRUNC | 2, os.O_TRUNC | 3]
_ANY = 0xFFFFFFFF
CHECKED_CALLS: list[tuple[str, int | None, int | None, int, int, list[int]]] = [
    # Before version 3 Landlock does not see that opening a file to read can also empty it.
    ("open", 2, None, 1, os.O_TRUNC | os.O_ACCMODE, _READS_OR_TRUNCATES_WHAT_IT_WRITES),
    ("openat", 257, 56, 2, os.O_TRUNC | os.O_ACCMODE, _READS_OR_TRUNCATES_WHAT_IT_WRITES),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: fcntl can also have signals sent to others.
    ("fcntl", 72, 25, 1, _ANY, [0, 1, 2, 3, 4, 1030]),
    # abort() and raise_signal(): to itself only.
    ("kill", 62, 129, 0, _ANY, [os.getpid()]),
    ("tgkill", 234, 131, 0, _ANY, [os.getpid()]),
]
# The kernel's names of the machines (linux/audit.h), and the column of their numbers above.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Landlock (linux/landlock.h): its three calls have the same numbers everywhere.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
_FIRST_VERSION = (1 << 13) - 1  # every right that version 1 knows

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


def main(secret_bytes: int, seconds: float, memory_bytes: int, parent: int) -> NoReturn:
    """Answers the secret and the verdict, and leaves with status 0; a program that leaves by itself answers nothing."""
    write, leave = os.write, os._exit  # the program may put its own in their place
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    # The secret is read first and then lies on the interpreter's evaluation stack until the verdict is there: in no
    # variable and no container, so that a program that looks through frames and objects does not meet it.
    write(answer, os.read(0, secret_bytes) + _verdict(seconds, memory_bytes, parent))
    leave(0)


def _verdict(seconds: float, memory_bytes: int, parent: int) -> bytes:
    program = sys.stdin.buffer.read()
    os.dup2(1, 0)
    try:
        _contain(seconds, memory_bytes, parent)
    except Exception as error:
        return f"not contained: {error}".encode()
    return _run(program)


def _run(program: bytes) -> bytes:
    reserve = bytearray(1 << 20)  # given back where memory has run out, to say so
    # As the program would be alone: the main module, with an environment that tells nothing.
    main_module = types.ModuleType("__main__")
    sys.modules["__main__"] = main_module
    sys.argv = ["program.py"]
    os.environ.clear()
    try:
        exec(compile(program.decode(), "program.py", "exec", dont_inherit=True), vars(main_module))  # noqa: S102
    except MemoryError:
        del reserve
        return b"out of memory"
    except SystemExit:
        return b"ended before its last line"
    except BaseException as error:
        name = type(error).__name__
        return b"failed: " + (name.encode() if name.isidentifier() and len(name) < 80 else b"an exception")
    return b"passed"


# ---- the walls -----------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _check(what: str, result: int) -> int:
    if result < 0:
        raise OSError(f"{what} is refused ({os.strerror(ctypes.get_errno())})")
    return result


def _call(what: str, number: int, *arguments: int | bytes | None) -> int:
    # Every whole number as a full register: ctypes would pass 32 bits of it.
    full = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(what, _libc.syscall(ctypes.c_long(number), *full))


def _prctl(what: str, option: int, *arguments: Any) -> None:
    full = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    _check(what, _libc.prctl(option, *full, *[ctypes.c_ulong(0)] * (4 - len(full))))


def _contain(seconds: float, memory_bytes: int, parent: int) -> None:
    """Builds the walls around this process; raises OSError, with the reason, where this machine lacks one."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"no system call numbers are known for {machine}")
    # If the thread that waits for this process dies, so does this process. No core dumps, also none to a handler.
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:  # it died before this could be said
        raise OSError("nobody waits for this program")
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
    _limit(seconds, memory_bytes)
    _restrict_files()
    # struct __user_cap_header_struct of version 3 for this process, and two empty sets.
    _check("capset", _libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)))
    _restrict_calls(machine)


def _limit(seconds: float, memory_bytes: int) -> None:
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    processor = int(seconds) + 2  # the second line: the clock of sandbox.py comes first
    for kind, limit in (
        (resource.RLIMIT_AS, own + memory_bytes),
        (resource.RLIMIT_CPU, processor),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _restrict_files() -> None:
    version = _call("Landlock", _CREATE_RULESET, None, 0, 1)
    truncate = _TRUNCATE if version >= 3 else 0
    handled = (_FIRST_VERSION & ~_READ_DIR) | truncate
    ruleset = _call("Landlock", _CREATE_RULESET, struct.pack("=Q", handled), 8, 0)

    def allow(path: str, rights: int) -> None:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return  # no such folder on this system: nothing to read there
        _call("Landlock", _ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, opened), 0)
        os.close(opened)

    # Python's own modules and the libraries they load: no tokens in homes, nothing about other processes in /proc.
    for path in {sys.base_prefix, sys.base_exec_prefix, *sys.path, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"}:
        allow(path, _READ_FILE)
    allow("/dev/urandom", _READ_FILE)
    allow(os.devnull, _READ_FILE | _WRITE_FILE | truncate)
    # Flat: no folders in it, no links, no devices. So its size is quick to add up and it is easy to remove.
    allow(os.getcwd(), _READ_FILE | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | truncate)
    _call("Landlock", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _restrict_calls(machine: str) -> None:
    steps = _filter(machine)
    buffer = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    _prctl("seccomp", _PR_SET_SECCOMP, 2, program)


def _filter(machine: str) -> bytes:
    """The allow-list as a BPF program over struct seccomp_data: number at 0, machine at 4, arguments from 16 on."""
    load, mask, equal, leave = 0x20, 0x54, 0x15, 0x06
    allowed, refused, killed = 0x7FFF0000, 0x00050000 | 13, 0x80000000  # 13: EACCES

    def step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        """One struct sock_filter; the jumps count the steps that are left out."""
        return struct.pack("=HBBI", code, then, otherwise, value)

    arch, column = MACHINES[machine]
    # Another machine's calls (32 bits) have other numbers: a program has no business with them.
    steps = [step(load, 4), step(equal, arch, 1, 0), step(leave, killed), step(load, 0)]
    words = CALLS.split()
    for number in words[1 + column :: 3]:
        if number != "-":
            steps += [step(equal, int(number), 0, 1), step(leave, allowed)]
    for _, *columns, position, bits, values in CHECKED_CALLS:
        checked = columns[column]
        if checked is None:
            continue
        # The low half of the argument: flags, commands and process ids have 32 bits.
        block = [step(load, 16 + 8 * position), step(mask, bits)]
        for value in values:
            block += [step(equal, value, 0, 1), step(leave, allowed)]
        block.append(step(leave, refused))
        steps += [step(equal, checked, 0, len(block)), *block]
    return b"".join([*steps, step(leave, refused)])


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
