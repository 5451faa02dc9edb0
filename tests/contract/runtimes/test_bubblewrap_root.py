"""What is in the root of a container of bubblewrap."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.contract.runtimes.subjects import BUBBLEWRAPS, Subject
from tests.support.containers import new_container
from tests.support.images import bubblewrap_fault
from tests.support.paths import ROOT
from tests.support.users import NOBODY, needs_root
from tests.support.waiting import PATIENCE
from trio_pilot.runtimes import Container, Mount, Options, Runtime, bubblewrap
from trio_pilot.runtimes.bubblewrap_root import follow, root_of

RESOLVER, HOSTS = Path("/etc/resolv.conf").read_text(), Path("/etc/hosts").read_text()

both = pytest.mark.parametrize("subject", BUBBLEWRAPS, indirect=True)
and_apptainer = pytest.mark.parametrize("subject", [*BUBBLEWRAPS, "apptainer-directory"], indirect=True)


@pytest.fixture(autouse=True)
def needs_bubblewrap() -> None:
    if fault := bubblewrap_fault():
        pytest.skip(f"bubblewrap does not work here: {fault}")


@pytest.fixture
async def runtime(subject: Subject) -> AsyncIterator[Runtime]:
    async with subject.open(Options(kill_grace=0.3)) as runtime:
        yield runtime


async def output(runtime: Runtime, container: Container) -> str:
    with trio.fail_after(PATIENCE):
        ended = await runtime.run(container)
    assert ended.code == 0, (ended, container.stderr.read_text(errors="replace"))
    return container.stdout.read_text()


async def output_of_image(tmp_path: Path, image: Path, script: str, *mounts: Mount) -> str:
    async with bubblewrap.open_runtime(Options(kill_grace=0.3)) as runtime:
        return await output(runtime, new_container(tmp_path, ["sh", "-c", script], image=str(image), mounts=mounts))


@pytest.fixture
def own_image(tmp_path: Path, image: Path) -> Path:
    """An image that a test may change."""
    subprocess.run(["cp", "-a", str(image), str(tmp_path / "own")], check=True)
    return tmp_path / "own"


@and_apptainer
async def test_names_of_hosts_are_those_of_this_machine(subject: Subject, runtime: Runtime) -> None:
    said = await output(runtime, subject.container("cat", "/etc/resolv.conf", "/etc/hosts"))
    assert said == RESOLVER + HOSTS


@both
async def test_the_order_of_name_services_is_that_of_this_machine(subject: Subject, runtime: Runtime) -> None:
    said = await output(runtime, subject.container("cat", "/etc/nsswitch.conf"))
    assert said == Path("/etc/nsswitch.conf").read_text()  # noqa: ASYNC240


@pytest.mark.parametrize("target", ["/run/systemd/resolve/stub.conf", "../run/resolv.conf", "/nowhere/at/all", "/dev/null"])
async def test_a_link_of_an_image_does_not_hide_the_names_of_hosts(tmp_path: Path, own_image: Path, target: str) -> None:
    (own_image / "etc/resolv.conf").symlink_to(target)
    said = await output_of_image(tmp_path, own_image, "cat /etc/resolv.conf; ls /etc/this-is-the-image")
    assert said == f"{RESOLVER}/etc/this-is-the-image\n"


async def test_files_that_an_image_has_are_covered_where_they_are(tmp_path: Path, own_image: Path) -> None:
    for name in ("resolv.conf", "hosts", "nsswitch.conf"):
        (own_image / "etc" / name).write_text("of the image")
    (own_image / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nother:x:7:7::/:/bin/sh")
    (own_image / "etc/group").write_text("root:x:0:")
    assert f"--ro-bind {own_image}/etc /etc" in " ".join(root_of(own_image, ()).options)
    said = await output_of_image(tmp_path, own_image, "cat /etc/hosts; id -un; cat /etc/passwd; touch /etc/x || echo no")
    assert said.startswith(HOSTS)
    assert "other:x:7:7::/:/bin/sh" in said
    assert said.endswith("no\n")


IN_NAMESPACE = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
RUN_ONE = """
import os, sys, trio
from pathlib import Path
from tests.support.containers import new_container
from trio_pilot.runtimes import Mount, Options, bubblewrap

async def main(directory, image, script, *mounts):
    mounts = [Mount(Path(one), one) for one in mounts]
    container = new_container(Path(directory), ["sh", "-c", script], image=image, mounts=mounts)
    async with bubblewrap.open_runtime(Options(kill_grace=0.3)) as runtime:
        await runtime.prepare(image)
        ended = await runtime.run(container)
    print(container.stdout.read_text(), container.stderr.read_text(), ended.code)

user, *args = sys.argv[1:]
if int(user) != os.getuid():
    os.setgroups([])
    os.setresgid(int(user), int(user), int(user))
    os.setresuid(int(user), int(user), int(user))
trio.run(main, *args)
"""


def run_one(*args: str, user: int = 0, before: str = ":", cwd: Path = ROOT) -> str:
    """Run a container from another process, and return what it said, and its exit code."""
    command = [sys.executable, "-c", RUN_ONE, str(user), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*IN_NAMESPACE, f'{before} && exec "$@"', "sh", *command],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that another user may write to, and that the root of a container shows."""
    with tempfile.TemporaryDirectory(dir="/opt", prefix="trio-pilot-test-") as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


@needs_root
def test_a_link_of_this_machine_into_run_is_followed(tmp_path: Path) -> None:
    before = (
        "mount -t tmpfs tmpfs /run && mkdir -p /run/a /run/b && echo 'nameserver 192.0.2.7' > /run/b/real &&"
        "ln -s ../b/real /run/a/link && cp -a /etc /run/etc && mount --bind /run/etc /etc &&"
        "rm -f /etc/resolv.conf && ln -s /run/a/link /etc/resolv.conf"
    )
    said = run_one(str(tmp_path), "/", "cat /etc/resolv.conf", before=before)
    assert said.split() == ["nameserver", "192.0.2.7", "0"]


@needs_root
@pytest.mark.parametrize("which", ["host", "image"])
def test_a_user_without_an_entry_has_a_name(open_directory: Path, own_image: Path, which: str) -> None:
    shutil.copytree(own_image, open_directory / "image", symlinks=True)
    (open_directory / "image").chmod(0o755)
    image = str(open_directory / "image") if which == "image" else "/"
    said = run_one(str(open_directory), image, "id -un; id -gn; grep 54321 /etc/passwd", user=54321).split()
    assert said == ["user54321", "user54321", "user54321:x:54321:54321::/tmp:/bin/sh", "0"]


@and_apptainer
async def test_var_tmp_is_writable_and_the_containers_own(subject: Subject, runtime: Runtime) -> None:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        script = f"echo data > /var/tmp/made; cat /var/tmp/made; ls {file.name} || echo hidden"
        assert await output(runtime, subject.container("sh", "-c", script)) == "data\nhidden\n"
    assert not await trio.Path("/var/tmp/made").exists()


@pytest.mark.parametrize("subject", ["bubblewrap-image", "apptainer-directory"], indirect=True)
async def test_a_var_tmp_that_is_a_link_stays_one(subject: Subject, own_image: Path) -> None:
    (own_image / "var/tmp").symlink_to("../tmp")
    subject.image = str(own_image)
    container = subject.container("sh", "-c", "echo data > /var/tmp/made; cat /tmp/made")
    async with subject.open(Options(kill_grace=0.3)) as runtime:
        assert await output(runtime, container) == "data\n"


@and_apptainer
async def test_sys_is_there_and_read_only(subject: Subject, runtime: Runtime) -> None:
    script = (
        "ls -d /sys/devices/system/cpu/cpu0; for file in /sys/module/printk/parameters/time"
        " $(find /sys/fs/cgroup -maxdepth 2 -type f); do (: >> $file) 2> /dev/null && echo $file; done; exit 0"
    )
    assert await output(runtime, subject.container("sh", "-c", script)) == "/sys/devices/system/cpu/cpu0\n"


@contextmanager
def at_the_root(name: str) -> Iterator[Path]:
    directory = Path(f"/{name}-{os.getpid()}")
    directory.mkdir()
    try:
        yield directory
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


@needs_root
def test_a_directory_that_can_only_be_entered_is_in_the_root(open_directory: Path) -> None:
    with at_the_root("trio-pilot-closed") as closed:
        (closed / "file").write_text("content")
        (closed / "below").mkdir()
        closed.chmod(0o711)
        script = f"cat {closed}/file; ls {closed} || true"
        said = run_one(str(open_directory), "/", script, str(closed / "below"), user=NOBODY)
    assert said.startswith("content")
    assert said.split()[-1] == "0"


@both
async def test_a_mount_whose_path_goes_through_a_link_is_at_that_path(
    subject: Subject, runtime: Runtime, open_directory: Path
) -> None:
    (open_directory / "real/inner").mkdir(parents=True)
    (open_directory / "real/inner/file").write_text("content")
    (open_directory / "link").symlink_to(open_directory / "real")
    (open_directory / "relative").symlink_to("link/inner")
    for path in (open_directory / "link/inner", open_directory / "relative"):
        container = subject.container("cat", f"{path}/file", mounts=[Mount(path, str(path))])
        assert await output(runtime, container) == "content"


async def test_links_of_an_image_are_followed_within_the_image(tmp_path: Path, own_image: Path) -> None:
    (own_image / "data").symlink_to("/var/data")
    (own_image / "usr/up").symlink_to("../../../home")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_text("content")
    for target in ("/data/new", "/usr/up/new"):
        mount = Mount(tmp_path / "source", target)
        assert await output_of_image(tmp_path, own_image, f"cat {target}/file", mount) == "content"


def test_links_in_a_circle_are_an_error(own_image: Path) -> None:
    (own_image / "one").symlink_to("two")
    (own_image / "two").symlink_to("one")
    with pytest.raises(OSError, match="too many symbolic links"):
        follow(own_image, "/one/directory")


@needs_root
def test_an_image_may_be_named_by_a_relative_path(tmp_path: Path, own_image: Path) -> None:
    said = run_one(str(tmp_path), own_image.name, "ls /etc/this-is-the-image", cwd=own_image.parent)
    assert said.split() == ["/etc/this-is-the-image", "0"]
