# Tokens that expire: RabbitMQ's own OAuth 2 plugin with a key of these tests, and a file that is renewed in time or not.

import base64
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.integration.test_broker_faults import send_all, settings
from tests.support.brokers import Rabbit, new_name
from tests.support.pilot_process import pilot, run_pilot
from tests.support.servers import RabbitServer
from tests.support.services import open_rabbitmq
from tests.support.waiting import BROKER, until
from trio_pilot.wire import EwmsWire, Message

CONFIG = """
auth_backends.1 = internal
auth_backends.2 = rabbit_auth_backend_oauth2
auth_oauth2.resource_server_id = rabbitmq
auth_oauth2.default_key = tests
auth_oauth2.signing_keys.tests = {key}
"""


class Issuer:
    """Issues tokens like EWMS's queue service, signed with RS256."""

    def __init__(self, directory: Path) -> None:
        self._secret, self.public = directory / "secret.pem", directory / "public.pem"
        self._openssl("genrsa", "-out", str(self._secret), "2048")
        self._openssl("rsa", "-in", str(self._secret), "-pubout", "-out", str(self.public))

    def token(self, seconds: float) -> str:
        scope = [f"rabbitmq.{right}:*/*" for right in ("configure", "read", "write")]
        claims = {"aud": ["rabbitmq"], "sub": "pilot", "scope": scope, "exp": int(time.time() + seconds)}
        said = ".".join(
            _base64(json.dumps(part).encode()) for part in ({"alg": "RS256", "typ": "JWT", "kid": "tests"}, claims)
        )
        return f"{said}.{_base64(self._openssl('dgst', '-sha256', '-sign', str(self._secret), given=said.encode()))}"

    def _openssl(self, *command: str, given: bytes = b"") -> bytes:
        return subprocess.run(["openssl", *command], input=given, capture_output=True, check=True).stdout


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with tempfile.TemporaryDirectory(prefix="trio-pilot-issuer-") as directory:
        Path(directory).chmod(0o755)  # for the server's user
        yield Issuer(Path(directory))


@pytest.fixture(scope="module")
def server(issuer: Issuer) -> Iterator[RabbitServer]:
    with open_rabbitmq(config=CONFIG.format(key=issuer.public), plugins="rabbitmq_auth_backend_oauth2") as server:
        yield server


@pytest.fixture
def broker(server: RabbitServer) -> Rabbit:
    return Rabbit(server)


def logs_of(broker: Rabbit) -> list[str]:
    return [path.read_text() for path in (broker.server.directory / "log").iterdir()]


@pytest.mark.parametrize(("life", "run"), [(8, 12), pytest.param(60, 300, marks=pytest.mark.soak)])
async def test_a_token_is_renewed_through_its_file_without_a_new_connection(
    broker: Rabbit, issuer: Issuer, tmp_path: Path, life: int, run: int
) -> None:
    queue, file, directory = new_name(), tmp_path / "token", tmp_path / "slot"
    directory.mkdir()
    file.write_text(issuer.token(life))

    async def renew() -> None:
        while True:
            await trio.sleep(life / 2)
            new = file.with_suffix(".new")
            new.write_text(issuer.token(life) + "\n")
            new.rename(file)

    def arrived(count: int) -> bool:
        return broker.ready(f"{queue}-out") == count

    given = settings(broker, queue, TIMEOUT_QUEUE_INCOMING=life / 2, BROKER_TOKEN=f"@{file}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(renew)
        broker.declare(f"{queue}-out")
        with pilot(directory, given) as child:
            count, end = 0, trio.current_time() + run
            while trio.current_time() < end:
                await send_all(broker, queue, EwmsWire().encode(Message(count)))
                count += 1
                await until(partial(arrived, count), "the output", BROKER)
                await trio.sleep(life / 10)
            _, stderr = await trio.to_thread.run_sync(child.communicate)
        nursery.cancel_scope.cancel()
    assert child.returncode == 0, stderr
    assert "connecting again" not in stderr
    assert count > run / life
    assert sum(log.count("user 'pilot' updated secret") for log in logs_of(broker)) >= 2 * run / life  # of source and sink


async def test_an_expired_token_is_named_and_not_shown(broker: Rabbit, issuer: Issuer, tmp_path: Path) -> None:
    token = issuer.token(-60)
    ended = await trio.to_thread.run_sync(run_pilot, tmp_path, settings(broker, new_name(), BROKER_TOKEN=token))
    assert ended.code == 3
    assert "the token expired at" in ended.last_line
    assert token not in ended.stderr


async def test_an_expired_token_in_a_file_is_waited_for(broker: Rabbit, issuer: Issuer, tmp_path: Path) -> None:
    file, queue, directory = tmp_path / "token", new_name(), tmp_path / "slot"
    directory.mkdir()
    file.write_text(issuer.token(-60))
    await send_all(broker, queue, EwmsWire().encode(Message(1)))
    with pilot(directory, settings(broker, queue, BROKER_TOKEN=f"@{file}", BROKER_PATIENCE=60)) as child:
        await trio.sleep(2)
        file.write_text(issuer.token(60))
        _, stderr = await trio.to_thread.run_sync(child.communicate)
    assert child.returncode == 0, stderr
    assert "the token expired at" in stderr
    assert broker.ready(f"{queue}-out") == 1


async def test_a_token_file_that_is_not_there_is_one_clear_line(broker: Rabbit, tmp_path: Path) -> None:
    given = settings(broker, new_name(), BROKER_TOKEN="@/nowhere/token", BROKER_PATIENCE=0)
    ended = await trio.to_thread.run_sync(run_pilot, tmp_path, given)
    assert ended.code == 3
    assert "/nowhere/token" in ended.last_line
