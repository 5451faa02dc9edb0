import re
from pathlib import Path

import pytest

from trio_pilot.cli.app import app
from trio_pilot.errors import SettingsError

GIVEN = {"--broker": "amqp://host", "--queue-incoming": "in", "--queue-outgoing": "out", "--task-args": "true"}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    return tmp_path


def command(*flags: str) -> None:
    given = GIVEN | {name: value for name, _, value in (flag.partition("=") for flag in flags)}
    arguments = ["condor-submit", *(f"{name}={value}" if value else name for name, value in given.items())]
    assert app(arguments, exit_on_error=False, print_error=False, result_action="return_value") == 0


def described(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    command("--executable=file", *flags)
    text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", capsys.readouterr().out, flags=re.MULTILINE))
    lines = [line.partition(" = ") for line in text.splitlines()]
    assert lines[-1][0].startswith("queue ")
    return {name: value for name, _, value in lines} | {"queue": text.split()[-1]}


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SettingsError) as raised:
        described(capsys, *flags)
    return str(raised.value)


def test_what_is_asked_of_htcondor_is_said_in_its_units(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    found = described(capsys, "--pilots=3", "--cpus=2", "--memory=1g", "--disk=1m", "--time=3600")
    asked = ("queue", "request_cpus", "request_memory", "request_disk", "+OriginalTime", "executable")
    assert [found[name] for name in asked] == ["3", "2", "1024", "1024", "3600", str(directory / "file")]


def test_settings_are_variables_that_neither_quotes_nor_macros_harm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EWMS_PILOT_TASK_TIMEOUT", "7")
    found = described(capsys, """--task-args=sh -c 'echo "$(HOME)"'""")["environment"]
    assert "EWMS_PILOT_TASK_TIMEOUT='7'" in found
    assert """EWMS_PILOT_TASK_ARGS='sh -c ''echo ""$(DOLLAR)(HOME)""'''""" in found
    assert "EWMS_PILOT_HTCHIRP='true'" in found


def test_pilots_need_not_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert "EWMS_PILOT_HTCHIRP='False'" in described(capsys, "--no-htchirp")["environment"]


@pytest.mark.parametrize(
    "flag",
    ["--broker-token=x", "--broker=amqp://u:p@h", "--broker=u:p@h", "--broker=amqp://[u:p", '--task-env-json={"A":"b"}'],
)
def test_secrets_do_not_become_part_of_the_job(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert refused(capsys, flag) == (
        f"{flag.partition('=')[0]} may be secret, and the environment of a job is not:"
        " set it in trio-pilot.toml, which is transferred with the job"
    )


def test_a_file_of_settings_goes_with_the_job(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "trio-pilot.toml").write_text("broker-token = 'secret'")
    found = described(capsys, "--transfer=file")
    assert found["transfer_input_files"] == f"{directory}/trio-pilot.toml, {directory}/file"
    assert "secret" not in str(found)
    (directory / "trio-pilot.toml").rename(directory / "mine.toml")
    found = described(capsys, "--config=mine.toml")
    assert found["transfer_input_files"] == f"{directory}/mine.toml"
    assert "EWMS_PILOT_CONFIG='mine.toml'" in found["environment"]


@pytest.mark.parametrize("by", ["flag", "file"])
def test_a_token_in_a_file_goes_with_the_job(capsys: pytest.CaptureFixture[str], directory: Path, by: str) -> None:
    token = directory / "token"
    token.write_text("secret")
    (directory / "trio-pilot.toml").write_text(f'broker-token = "@{token}"' if by == "file" else "")
    found = described(capsys, *([f"--broker-token=@{token}"] if by == "flag" else []))
    assert "EWMS_PILOT_BROKER_TOKEN='@./token'" in found["environment"]
    assert found["transfer_input_files"] == f"{directory}/trio-pilot.toml, {token}"


def test_tokens_are_all_in_files_or_none_is(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "trio-pilot.toml").write_text('queue-incoming-auth-token = "@/file;secret"')
    assert (
        refused(capsys, "--queue-incoming=a;b")
        == "--queue-incoming-auth-token must have all tokens in files (@/FILE), or none"
    )


def test_files_of_one_name_cannot_go_together(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "other").mkdir()
    (directory / "other/file").touch()
    assert "have the same name" in refused(capsys, "--transfer=file", f"--broker-token=@{directory}/other/file")


def test_an_image_is_its_own_executable(capsys: pytest.CaptureFixture[str]) -> None:
    command("--container-image=docker://x")
    said = capsys.readouterr().out
    assert "universe = container\ncontainer_image = docker://x\n" in said
    assert "executable" not in said


@pytest.mark.parametrize(
    ("image", "is_sent"), [("docker://x", True), ("/images/x.sif", True), ("/images/x", False), ("/cvmfs/images/x:1", False)]
)
def test_an_image_that_is_a_directory_stays_where_it_is(
    capsys: pytest.CaptureFixture[str], image: str, is_sent: bool
) -> None:
    command(f"--container-image={image}")
    assert ("transfer_container = false\n" in capsys.readouterr().out) is not is_sent


def test_pilots_may_come_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    found = described(capsys, "--cron=*/30 8-18 * * 1-5")
    names = ("minute", "hour", "day_of_month", "month", "day_of_week")
    assert [found[f"cron_{name}"] for name in names] == ["*/30", "8-18", "*", "*", "1-5"]
    assert found["on_exit_remove"] == "false"
    assert "max_retries" not in found
    assert "cron_minute" not in described(capsys)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--executable=none", "there is no file none to transfer with the job"),
        ("--memory=much", "--memory must be a number of bytes such as 512m or 2g, not 'much'"),
        ("--cron=a * * * *", "--cron must be five fields as in a crontab, such as '*/30 * * * *', not 'a * * * *'"),
        ("--cron=5", "--cron must be five fields as in a crontab, such as '*/30 * * * *', not '5'"),
        ("--broker=queues.db", "queue in is in a file of this machine: name a broker, as in --broker amqp://HOST"),
        (
            "--task-args=a\nb",
            "EWMS_PILOT_TASK_ARGS has a line break, which the environment of a job cannot have: set it in trio-pilot.toml",
        ),
    ],
)
def test_what_cannot_work_is_told(capsys: pytest.CaptureFixture[str], flag: str, message: str) -> None:
    assert refused(capsys, flag) == message


def test_an_installed_command_is_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="--executable must name trio-pilot as one file"):
        command()
    assert capsys.readouterr().out == ""
