"""The filter of system calls: its program, as the kernel would run it."""

import errno
import struct
from typing import Any

import pytest

from trio_pilot.runtimes import seccomp
from trio_pilot.runtimes.seccomp import ALLOW, FAIL, MACHINES, OF_NAMESPACES

EPERM, ENOSYS = FAIL | errno.EPERM, FAIL | errno.ENOSYS

machines = pytest.mark.parametrize("machine", MACHINES)


def verdict(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """Run a program of BPF for a system call."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("=HBBI", program))
    at, value = 0, 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        match code:
            case seccomp.LOAD:
                (value,) = struct.unpack_from("=I", data, operand)
            case seccomp.RETURN:
                return int(operand)
            case seccomp.JUMP_EQUAL:
                at += if_true if value == operand else if_false
            case seccomp.JUMP_AT_LEAST:
                at += if_true if value >= operand else if_false
            case seccomp.JUMP_ANY_BIT:
                at += if_true if value & operand else if_false


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    def on(machine: str, **more: bool) -> Any:
        monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"machine": machine}))
        program, (architecture, _) = seccomp.seccomp_filter(**more), MACHINES[machine]
        assert program is not None
        return lambda number, *arguments: verdict(program, architecture, number, *arguments)

    return on


@machines
def test_each_call_is_refused_or_not_as_the_table_says(machine: str, on: Any) -> None:
    numbers, run = MACHINES[machine][1], on(machine)
    by_number = {number: name for name, number in numbers.items()}
    for number in range(600):
        name = by_number.get(number)
        expected = {None: ALLOW, "clone3": ENOSYS}.get(name, EPERM)
        if name not in ("clone", "ioctl", "socket", "personality"):
            assert run(number) == expected, (number, name)


@machines
@pytest.mark.parametrize(
    ("call", "arguments", "is_refused"),
    [
        ("clone", (0x003D0F00,), False),  # a thread
        ("clone", (17,), False),
        *(("clone", (17 | flag,), True) for flag in (0x20000, 0x2000000, 0x4000000, 0x10000000, 0x20000000, 0x40000000)),
        ("ioctl", (0, 0x5412), True),
        ("ioctl", (0, 0xFFFFFFFF00005412), True),  # the kernel drops the upper half
        ("ioctl", (0, 0x5413), False),
        ("socket", (40, 1), True),
        ("socket", (2, 1), False),
        ("personality", (0xFFFFFFFF,), False),
        ("personality", (0,), False),
        ("personality", (0x40000,), True),
    ],
)
def test_some_calls_depend_on_an_argument(
    machine: str, on: Any, call: str, arguments: tuple[int, ...], is_refused: bool
) -> None:
    number = MACHINES[machine][1][call]
    assert on(machine)(number, *arguments) == (EPERM if is_refused else ALLOW)


@machines
def test_namespaces_can_be_allowed(machine: str, on: Any) -> None:
    run, numbers = on(machine, allow_namespaces=True), MACHINES[machine][1]
    assert {name for name in OF_NAMESPACES if run(numbers[name], 0x10000000) != ALLOW} == set()
    assert run(numbers["keyctl"]) == run(numbers["bpf"]) == EPERM


@machines
def test_calls_of_other_architectures_are_refused(machine: str, on: Any) -> None:
    program = on(machine) and seccomp.seccomp_filter()
    assert program
    assert verdict(program, 0x40000003, 1) == ENOSYS
    assert verdict(program, MACHINES[machine][0], 0x40000000 + 1) == ENOSYS


def test_other_machines_have_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"machine": "riscv64"}))
    assert seccomp.seccomp_filter() is None
    assert seccomp.seccomp_rules() == {}
    assert seccomp.number_of("keyctl") is None
