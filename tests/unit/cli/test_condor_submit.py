import re
from pathlib import Path

import pytest

from trio_pilot.cli.app import app
from trio_pilot.errors import SettingsError

GIVEN = {"--broker": "amqp://host", "--queue-incoming": "in", "--queue-outgoing": "out", "--task-args": "true"}

SECRET_ADDRESSES = "--broker=nats://T@h", "--broker=T@h", "--broker=nats://a:1,nats://T@h", "--broker=pulsar://h/?token=x"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    return tmp_path


def command(*flags: str) -> None:
    given = GIVEN | {name: value for name, _, value in (flag.partition("=") for flag in flags)}
    arguments = ["condor-submit", *(f"{name}={value}" if value else name for name, value in given.items())]
    assert app(arguments, exit_on_error=False, print_error=False, result_action="return_value") == 0


def submit_file(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    command("--executable=file", *flags)
    text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", capsys.readouterr().out, flags=re.MULTILINE))
    lines = [line.partition(" = ") for line in text.splitlines()]
    assert lines[-1][0].startswith("queue ")
    return {name: value for name, _, value in lines} | {"queue": text.split()[-1]}


def error_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SettingsError) as raised:
        submit_file(capsys, *flags)
    return str(raised.value)


def test_requests_are_in_the_units_of_htcondor(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    found = submit_file(capsys, "--pilots=3", "--cpus=2", "--memory=1g", "--disk=1m", "--time=3600")
    asked = ("queue", "request_cpus", "request_memory", "request_disk", "+OriginalTime", "executable")
    assert [found[name] for name in asked] == ["3", "2", "1024", "1024", "3600", str(directory / "file")]


def test_settings_are_variables_with_quotes_and_macros_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EWMS_PILOT_TASK_TIMEOUT", "7")
    found = submit_file(capsys, """--task-args=sh -c 'echo "$(HOME)"'""")["environment"]
    assert "EWMS_PILOT_TASK_TIMEOUT='7'" in found
    assert """EWMS_PILOT_TASK_ARGS='sh -c ''echo ""$(DOLLAR)(HOME)""'''""" in found
    assert "EWMS_PILOT_HTCHIRP='true'" in found


@pytest.mark.parametrize("word", ["$HOME", "`id`", r"\$"])
def test_values_that_apptainer_would_evaluate_are_refused(capsys: pytest.CaptureFixture[str], word: str) -> None:
    arguments = f"""--task-args=echo "{word}" """
    assert f"EWMS_PILOT_TASK_ARGS has {word[0]!r}" in error_of(capsys, "--container-image=image", arguments)
    assert word in submit_file(capsys, arguments)["environment"].replace("$(DOLLAR)", "$")


def test_reports_by_chirp_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert "EWMS_PILOT_HTCHIRP='False'" in submit_file(capsys, "--no-htchirp")["environment"]


def test_reports_as_ewms_has_them_take_an_io_proxy(capsys: pytest.CaptureFixture[str]) -> None:
    found = submit_file(capsys)
    assert found["+WantIOProxy"] == "true"
    assert "time() - HTChirpEWMSPilotLastUpdatedTimestamp > 900 + (CumulativeSuspensionTime ?: 0)" in found["periodic_hold"]


def test_delayed_reports_take_no_io_proxy_and_more_silence(capsys: pytest.CaptureFixture[str]) -> None:
    found = submit_file(capsys, "--htchirp-dest=JOB_ATTR_DELAYED")
    assert "+WantIOProxy" not in found
    assert "HTChirp" not in found["periodic_hold"] + found["on_exit_hold_reason"]
    assert found["on_exit_hold_reason"].startswith("ChirpEWMSPilotError ?: ")
    assert "time() - ChirpEWMSPilotLastUpdatedTimestamp > 2100 " in found["periodic_hold"]
    assert "EWMS_PILOT_HTCHIRP_DEST='JOB_ATTR_DELAYED'" in found["environment"]


@pytest.mark.parametrize(
    "flag",
    [
        "--broker-token=x",
        "--broker=amqp://u:p@h",
        "--broker=u:p@h",
        "--broker=amqp://[u:p",
        *SECRET_ADDRESSES,
        "--broker=amqp://h/?key=x",
        "--task-image=docker://u:p@h/image",
        "--task-args=curl https://u:p@h",
        '--task-env-json={"A":"b"}',
    ],
)
def test_secrets_in_flags_are_refused(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert error_of(capsys, flag) == (
        f"{flag.partition('=')[0]} may be secret, and the environment of a job is not:"
        " set it in trio-pilot.toml, which is transferred with the job"
    )


def test_a_password_for_the_image_of_the_job_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--container-image has a password in it" in error_of(capsys, "--container-image=docker://u:p@h/image")


def test_the_file_of_settings_is_transferred_with_the_job(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "trio-pilot.toml").write_text("broker-token = 'secret'")
    found = submit_file(capsys, "--transfer=file")
    assert found["transfer_input_files"] == f"{directory}/trio-pilot.toml, {directory}/file"
    assert "secret" not in str(found)
    (directory / "trio-pilot.toml").rename(directory / "mine.toml")
    found = submit_file(capsys, "--config=mine.toml")
    assert found["transfer_input_files"] == f"{directory}/mine.toml"
    assert "EWMS_PILOT_CONFIG='mine.toml'" in found["environment"]


@pytest.mark.parametrize("by", ["flag", "file"])
def test_a_token_file_is_transferred_with_the_job(capsys: pytest.CaptureFixture[str], directory: Path, by: str) -> None:
    token = directory / "token"
    token.write_text("secret")
    (directory / "trio-pilot.toml").write_text(f'broker-token = "@{token}"' if by == "file" else "")
    found = submit_file(capsys, *([f"--broker-token=@{token}"] if by == "flag" else []))
    assert "EWMS_PILOT_BROKER_TOKEN='@./token'" in found["environment"]
    assert found["transfer_input_files"] == f"{directory}/trio-pilot.toml, {token}"


def test_a_setting_has_all_its_tokens_in_files_or_none(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "trio-pilot.toml").write_text('queue-incoming-auth-token = "@/file;secret"')
    assert (
        error_of(capsys, "--queue-incoming=a;b")
        == "--queue-incoming-auth-token must have all tokens in files (@/FILE), or none"
    )


def test_two_files_of_the_same_name_are_refused(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "other").mkdir()
    (directory / "other/file").touch()
    assert "have the same name" in error_of(capsys, "--transfer=file", f"--broker-token=@{directory}/other/file")


def test_an_image_needs_no_executable(capsys: pytest.CaptureFixture[str]) -> None:
    command("--container-image=docker://x")
    said = capsys.readouterr().out
    assert "universe = container\ncontainer_image = docker://x\n" in said
    assert "executable" not in said


@pytest.mark.parametrize(
    ("image", "is_sent"), [("docker://x", True), ("/images/x.sif", True), ("/images/x", False), ("/cvmfs/images/x:1", False)]
)
def test_an_image_that_is_a_directory_is_not_transferred(
    capsys: pytest.CaptureFixture[str], image: str, is_sent: bool
) -> None:
    command(f"--container-image={image}")
    assert ("transfer_container = false\n" in capsys.readouterr().out) is not is_sent


def test_cron_starts_pilots_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    found = submit_file(capsys, "--cron=*/30 8-18 * * 1-5")
    names = ("minute", "hour", "day_of_month", "month", "day_of_week")
    assert [found[f"cron_{name}"] for name in names] == ["*/30", "8-18", "*", "*", "1-5"]
    assert found["on_exit_remove"] == "false"
    assert "max_retries" not in found
    assert "cron_minute" not in submit_file(capsys)


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
def test_what_cannot_work_is_an_error(capsys: pytest.CaptureFixture[str], flag: str, message: str) -> None:
    assert error_of(capsys, flag) == message


def test_an_installed_command_is_no_executable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="--executable must name trio-pilot as one file"):
        command()
    assert capsys.readouterr().out == ""
