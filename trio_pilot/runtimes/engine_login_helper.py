"""Helper programs that keep logins for registries: `docker-credential-NAME`, by docker's protocol."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

import trio

TIMEOUT = 30.0  # seconds; one that asks a cloud takes a few
INTERVAL = 0.1  # seconds between two looks whether it is still wanted
SHOWN = 200  # characters of what it says in an error

NOT_FOUND = "credentials not found"  # what it says if it has no login
TOKEN = "<token>"  # noqa: S105 -- in place of a user's name, where the secret is a token
OWN_VARIABLES = ("EWMS_", "_EWMS_")  # how names of the pilot's own variables begin, its tokens among them


class HelperError(Exception):
    """A helper program failed."""


def ask_helper(name: str, server: str) -> Mapping[str, str] | None:
    """Return the login that a helper program has for a registry; None if it has none. Blocks.

    Args:
        name: the program's, without `docker-credential-`.
        server: what the program calls the registry.

    Raises:
        HelperError: it is not there, fails, takes too long, or its answer is not as expected.
    """
    program = shutil.which(f"docker-credential-{name}")
    if program is None:
        raise HelperError("it is not on PATH")
    code, said = _run(program, server)
    text = said.decode(errors="replace").strip()
    if code:
        if NOT_FOUND in text:
            return None
        raise HelperError(f"exit code {code}: {text.splitlines()[0][:SHOWN] if text else 'it says nothing'}")
    try:
        answer = json.loads(text)
        user, secret = str(answer.get("Username") or ""), str(answer.get("Secret") or "")
    except (ValueError, AttributeError):
        raise HelperError("its answer is not an object of JSON") from None  # it may be a secret
    if not secret:
        return None
    return {"identitytoken": secret} if user == TOKEN else {"username": user, "password": secret}


def _run(program: str, server: str) -> tuple[int, bytes]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
    try:
        process = subprocess.Popen(
            [program, "get"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise HelperError(f"it cannot be started: {error.strerror}") from error
    with process:
        try:
            return _communicate(process, server.encode())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _communicate(process: "subprocess.Popen[bytes]", given: bytes) -> tuple[int, bytes]:
    deadline, rest = time.monotonic() + TIMEOUT, given or None
    while time.monotonic() < deadline:
        try:
            said, _ = process.communicate(rest, timeout=INTERVAL)
        except subprocess.TimeoutExpired:
            rest = None  # it is on its way
        else:
            return process.returncode, said
        with suppress(RuntimeError):  # not in a thread of Trio's
            trio.from_thread.check_cancelled()
    raise HelperError(f"it has not answered in {TIMEOUT:g} s")
