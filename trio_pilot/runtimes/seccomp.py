"""The filter of system calls for bubblewrap and apptainer, which have none of their own: a deny list like docker's default.

Bubblewrap takes a program of classic BPF (linux/filter.h, seccomp(2)), apptainer a list of rules as docker does. What is
refused fails with EPERM; clone3(2), whose flags no filter can read, with ENOSYS, so that clone(2) is used instead.
Programs of another architecture, which have other numbers, and those of the x32 ABI are refused every call.
"""

import errno
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of linux/filter.h and linux/seccomp.h.
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; each argument has 8 bytes
X32 = 0x40000000  # the bit in numbers of the x32 ABI

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
NEW_NAMESPACES = 0x7E020000
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # of ioctl(2): they feed input to a terminal
AF_VSOCK = 40  # of socket(2): it reaches the hypervisor
BITS = [1 << bit for bit in range(32)]
ALL_BITS, TOP_BIT = 0xFFFFFFFF, BITS[-1]
TRACER_REQUESTS, TRACE_SECCOMP = (0x4200, 0x4206), 0x80  # of ptrace(2): those that take options, and the option
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)  # those that docker allows

# Calls that have the same number on all machines, those before 424 apart.
COMMON = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "clone3": 435,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "open_tree_attr": 467,
}
# fmt: off
X86_64 = COMMON | {
    "ioctl": 16, "socket": 41, "clone": 56, "syslog": 103, "uselib": 134, "personality": 135, "ustat": 136, "sysfs": 139,
    "vhangup": 153, "pivot_root": 155, "_sysctl": 156, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166,
    "swapon": 167, "swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173, "create_module": 174, "init_module": 175,
    "delete_module": 176, "get_kernel_syms": 177, "query_module": 178, "quotactl": 179, "nfsservctl": 180,
    "lookup_dcookie": 212, "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
    "unshare": 272, "perf_event_open": 298, "fanotify_init": 300, "open_by_handle_at": 304, "setns": 308, "kcmp": 312,
    "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
}
AARCH64 = COMMON | {
    "lookup_dcookie": 18, "ioctl": 29, "umount2": 39, "mount": 40, "pivot_root": 41, "nfsservctl": 42, "vhangup": 58,
    "quotactl": 60, "acct": 89, "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105,
    "delete_module": 106, "clock_settime": 112, "syslog": 116, "reboot": 142, "settimeofday": 170, "socket": 198,
    "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220, "swapon": 224, "swapoff": 225,
    "perf_event_open": 241, "fanotify_init": 262, "open_by_handle_at": 265, "setns": 268, "kcmp": 272,
    "finit_module": 273, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
}
# fmt: on
# The number of an architecture in linux/audit.h, and of its calls.
MACHINES: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "x86_64": (0xC000003E, X86_64),
    "aarch64": (0xC00000B7, AARCH64),
}

# What makes namespaces, and what is mounted there; nested containers need them.
OF_NAMESPACES = frozenset(
    (
        *("clone", "clone3", "unshare", "setns", "mount", "umount2", "pivot_root", "move_mount", "open_tree"),
        *("open_tree_attr", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr"),
    )
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction of BPF; the jumps are relative to the next one."""

    code: int
    operand: int
    if_true: int = 0
    if_false: int = 0

    def __bytes__(self) -> bytes:
        return struct.pack("=HBBI", self.code, self.if_true, self.if_false, self.operand)


Block = Sequence[Instruction]
PASS: Block = (Instruction(RETURN, ALLOW),)
REFUSE: Block = (Instruction(RETURN, FAIL | errno.EPERM),)
UNKNOWN: Block = (Instruction(RETURN, FAIL | errno.ENOSYS),)


def seccomp_filter(*, allow_namespaces: bool = False) -> bytes | None:
    """Return the filter for this machine, as bubblewrap's --seccomp reads it; None if there is none for its architecture.

    Args:
        allow_namespaces: whether to let programs make namespaces of their own, and mount in them.
    """
    machine = os.uname().machine
    if machine not in MACHINES or sys.maxsize < 2**32:  # the kernel may be of another architecture than its programs
        return None
    return b"".join(map(bytes, _program(*MACHINES[machine], allow_namespaces=allow_namespaces)))


def seccomp_rules(*, allow_namespaces: bool = False) -> Mapping[str, Any]:
    """Return the same filter as rules, as apptainer reads them from a file (--security seccomp:FILE); {}: there is none.

    Programs of other architectures are killed at their first call.
    """
    _, numbers = MACHINES.get(os.uname().machine, (0, {}))
    if not numbers:
        return {}
    refused = [name for name in numbers if not (allow_namespaces and name in OF_NAMESPACES)]
    rules = [rule for name in refused for rule in _rules(name)]
    if not allow_namespaces:
        rules += map(_no_decision_by_tracers, TRACER_REQUESTS)
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}


def _rules(name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rules for a call. Each compares one argument, masked: no rule may compare the same argument twice."""
    # Apptainer knows but one error, EPERM. What is left to a tracer fails with ENOSYS where there is none.
    rule = {"names": [name], "action": "SCMP_ACT_TRACE" if name == "clone3" else "SCMP_ACT_ERRNO"}
    match name:
        case "clone":
            tests = [(0, bit, bit) for bit in BITS if bit & NEW_NAMESPACES]
        case "ioctl":
            tests = [(1, ALL_BITS, value) for value in (TIOCSTI, TIOCLINUX)]
        case "socket":
            tests = [(0, ALL_BITS, AF_VSOCK)]
        case "personality":
            tests = [(0, TOP_BIT | bit, bit) for bit in BITS[:-1] if bit not in PERSONALITIES]
            tests += [(0, TOP_BIT | bit, TOP_BIT) for bit in BITS[:-1]]  # not all bits, which asks what it is
        case _:
            tests = []
    if not tests:
        yield rule
    for index, mask, value in tests:
        yield {**rule, "args": [_test(index, mask, value)]}


def _test(index: int, mask: int, value: int) -> Mapping[str, Any]:
    return {"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value}


def _no_decision_by_tracers(request: int) -> Mapping[str, Any]:
    """Return the rule that no process may become a tracer that decides about calls, and so let clone3(2) through."""
    tests = [_test(0, ALL_BITS, request), _test(3, TRACE_SECCOMP, TRACE_SECCOMP)]
    return {"names": ["ptrace"], "action": "SCMP_ACT_ERRNO", "args": tests}


def number_of(call: str) -> int | None:
    """Return the number of a system call that the filter knows; None on a machine that it does not know."""
    _, numbers = MACHINES.get(os.uname().machine, (0, {}))
    return numbers.get(call)


def _program(architecture: int, numbers: Mapping[str, int], *, allow_namespaces: bool) -> Block:
    refused = {name: number for name, number in numbers.items() if not (allow_namespaces and name in OF_NAMESPACES)}
    blocks = {number: _block(name) for name, number in refused.items()}
    return (
        Instruction(LOAD, ARCHITECTURE),
        Instruction(JUMP_EQUAL, architecture, 1, 0),
        *UNKNOWN,
        Instruction(LOAD, NUMBER),
        Instruction(JUMP_AT_LEAST, X32, 0, 1),
        *UNKNOWN,
        *_search(_ranges(blocks)),
    )


def _block(name: str) -> Block:
    """Return the instructions for a call; they may look at its arguments, of which the kernel reads 32 bits as well."""
    match name:
        case "clone":
            return (Instruction(LOAD, FIRST_ARGUMENT), Instruction(JUMP_ANY_BIT, NEW_NAMESPACES, 0, 1), *REFUSE, *PASS)
        case "clone3":
            return UNKNOWN
        case "ioctl":
            return _unless_equal(FIRST_ARGUMENT + 8, (TIOCSTI, TIOCLINUX), REFUSE, PASS)
        case "socket":
            return _unless_equal(FIRST_ARGUMENT, (AF_VSOCK,), REFUSE, PASS)
        case "personality":
            return _unless_equal(FIRST_ARGUMENT, PERSONALITIES, PASS, REFUSE)
    return REFUSE


def _unless_equal(argument: int, values: Sequence[int], equal: Block, other: Block) -> Block:
    """Return the block `equal` for some values of an argument, and the block `other` for all others."""
    tests = [one for value in values for one in (Instruction(JUMP_EQUAL, value, 0, 1), *equal)]
    return (Instruction(LOAD, argument), *tests, *other)


def _ranges(blocks: Mapping[int, Block]) -> list[tuple[int, Block]]:
    """Return the first number of each range of calls, with the instructions for that range."""
    starts = sorted({0, *blocks, *(number + 1 for number in blocks)})
    found: list[tuple[int, Block]] = []
    for start in starts:
        block = blocks.get(start, PASS)
        if not found or found[-1][1] != block:
            found.append((start, block))
    return found


def _search(ranges: Sequence[tuple[int, Block]]) -> Block:
    """Return a binary search: the kernel runs the filter for each number when it loads it, so a list would cost more."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    return (Instruction(JUMP_AT_LEAST, ranges[middle][0], len(below), 0), *below, *above)
