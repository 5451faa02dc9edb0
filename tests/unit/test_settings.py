import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trio_pilot.brokers import LONGEST_LEASE, QueueAddress
from trio_pilot.errors import SettingsError
from trio_pilot.runtimes import Limits
from trio_pilot.settings import FIELDS, LEASE_MARGIN, Settings, environment, flag_of, load, unknown_variables, variables_of

NOWHERE = Path("/nonexistent")

# The contract with EWMS: variable, setting, text of the variable, value of the setting.
ROWS: list[tuple[str, str, str, Any]] = [
    ("EWMS_PILOT_TASK_IMAGE", "task_image", "icecube/skymap:1.2", "icecube/skymap:1.2"),
    ("EWMS_PILOT_TASK_ARGS", "task_args", "run 'two words' {{INFILE}} $(x)", ("run", "two words", "{{INFILE}}", "$(x)")),
    (
        "EWMS_PILOT_TASK_ENV_JSON",
        "task_env_json",
        '{"A": 1, "b_2": "x=,y", "C": 0.5}',
        {"A": "1", "b_2": "x=,y", "C": "0.5"},
    ),
    ("EWMS_PILOT_INIT_IMAGE", "init_image", "/cvmfs/image", "/cvmfs/image"),
    ("EWMS_PILOT_INIT_ARGS", "init_args", "--get {{DATA_HUB}}", ("--get", "{{DATA_HUB}}")),
    ("EWMS_PILOT_INIT_ENV_JSON", "init_env_json", "{}", {}),
    ("EWMS_PILOT_QUEUE_INCOMING", "queue_incoming", "q", ("q",)),
    ("EWMS_PILOT_QUEUE_OUTGOING", "queue_outgoing", "a;b", ("a", "b")),
    ("EWMS_PILOT_QUEUE_INCOMING_AUTH_TOKEN", "queue_incoming_auth_token", "t", ("t",)),
    ("EWMS_PILOT_QUEUE_OUTGOING_AUTH_TOKEN", "queue_outgoing_auth_token", ";t", ("", "t")),
    ("EWMS_PILOT_QUEUE_INCOMING_BROKER_TYPE", "queue_incoming_broker_type", "RabbitMQ;", ("rabbitmq", "")),
    ("EWMS_PILOT_QUEUE_OUTGOING_BROKER_TYPE", "queue_outgoing_broker_type", "rabbitmq", ("rabbitmq",)),
    ("EWMS_PILOT_QUEUE_INCOMING_BROKER_ADDRESS", "queue_incoming_broker_address", "u@h", ("u@h",)),
    ("EWMS_PILOT_QUEUE_OUTGOING_BROKER_ADDRESS", "queue_outgoing_broker_address", "u@h;", ("u@h", "")),
    ("EWMS_PILOT_DATA_DIR_PARENT_PATH_ON_HOST", "data_dir_parent_path_on_host", "/scratch", Path("/scratch")),
    ("EWMS_PILOT_INFILE_EXT", "infile_ext", "..JSON", ".json"),
    ("EWMS_PILOT_OUTFILE_EXT", "outfile_ext", "pkl", ".pkl"),
    ("EWMS_PILOT_PREFETCH", "prefetch", " 8 ", 8),
    ("EWMS_PILOT_TIMEOUT_QUEUE_WAIT_FOR_FIRST_MESSAGE", "timeout_queue_wait_for_first_message", "600", 600.0),
    ("EWMS_PILOT_TIMEOUT_QUEUE_INCOMING", "timeout_queue_incoming", "0.5", 0.5),
    ("EWMS_PILOT_EXTERNAL_DIRECTORIES", "external_directories", "/cvmfs, /data,", (Path("/cvmfs"), Path("/data"))),
    ("EWMS_PILOT_CL_LOG", "cl_log", "debug", "DEBUG"),
    ("EWMS_PILOT_CL_LOG_THIRD_PARTY", "cl_log_third_party", "ERROR", "ERROR"),
    ("EWMS_PILOT_HTCHIRP", "htchirp", "True", True),
    ("EWMS_PILOT_HTCHIRP_DEST", "htchirp_dest", "JOB_EVENT_LOG", "JOB_EVENT_LOG"),
    ("EWMS_PILOT_HTCHIRP_RATELIMIT_INTERVAL", "htchirp_ratelimit_interval", "30", 30.0),
    ("EWMS_PILOT_INIT_TIMEOUT", "init_timeout", "60", 60.0),
    ("EWMS_PILOT_TASK_TIMEOUT", "task_timeout", "3600", 3600.0),
    ("EWMS_PILOT_SUBPROC_TIMEOUT", "task_timeout", "1800", 1800.0),
    ("EWMS_PILOT_STOP_LISTENING_ON_TASK_ERROR", "stop_listening_on_task_error", "no", False),
    ("EWMS_PILOT_OKAY_ERRORS", "okay_errors", "TimeoutError  A", frozenset({"TimeoutError", "A"})),
    ("EWMS_PILOT_OKAY_ERRORS", "okay_errors", "['A', 'B']", frozenset({"A", "B"})),
    ("EWMS_PILOT_MAX_CONCURRENT_TASKS", "max_concurrent_tasks", "4", 4),
    ("EWMS_PILOT_KEEP_ALL_TASK_FILES", "keep_all_task_files", "1", True),
    ("EWMS_PILOT_DUMP_TASK_OUTPUT", "dump_task_output", "T", True),
    ("EWMS_PILOT_CONTAINER_DEBUG", "container_debug", "ON", True),
    ("EWMS_PILOT_QUARANTINE_TIME", "quarantine_time", "300", 300.0),
    ("_EWMS_PILOT_CONTAINER_PLATFORM", "runtime", "bubblewrap", "bubblewrap"),
    ("_EWMS_PILOT_APPTAINER_BUILD_WORKDIR", "apptainer_build_workdir", "/var/tmp", Path("/var/tmp")),
    (
        "_EWMS_PILOT_APPTAINER_IMAGE_DIRECTORY_MUST_BE_PRESENT",
        "apptainer_image_directory_must_be_present",
        "f",
        False,
    ),
    ("_EWMS_PILOT_DOCKER_SHM_SIZE", "docker_shm_size", "2g", 2 * 1024**3),
]

DEFAULTS: dict[str, Any] = {
    "task_args": (),
    "task_env_json": {},
    "task_timeout": None,
    "init_image": "",
    "init_timeout": None,
    "data_dir_parent_path_on_host": Path(),
    "infile_ext": ".in",
    "outfile_ext": ".out",
    "prefetch": 1,
    "timeout_queue_incoming": 1.0,
    "first_event_timeout": 1.0,
    "external_directories": (),
    "cl_log": "INFO",
    "cl_log_third_party": "WARNING",
    "htchirp": False,
    "htchirp_dest": "JOB_ATTR",
    "htchirp_ratelimit_interval": 60.0,
    "stop_listening_on_task_error": True,
    "okay_errors": frozenset(),
    "max_concurrent_tasks": 1,
    "keep_all_task_files": False,
    "dump_task_output": False,
    "container_debug": False,
    "quarantine_time": 0.0,
    "apptainer_build_workdir": Path("/var/tmp"),
    "apptainer_image_directory_must_be_present": True,
    "docker_shm_size": None,
}


def from_environment(**environ: str) -> Settings:
    return load({}, environ, NOWHERE)


@pytest.mark.parametrize(("variable", "name", "text", "value"), ROWS)
def test_each_variable_of_ewms_sets_its_setting(variable: str, name: str, text: str, value: Any) -> None:
    assert getattr(from_environment(**{variable: text}), name) == value


def test_each_setting_is_in_the_contract_or_known_as_an_addition() -> None:
    additions = {"config", "broker", "broker_token", "broker_patience", "wire", "max_payload", "max_attempts"}
    additions |= {"grace", "kill_grace", "settle_grace", "engine_patience", "dead_letter_directory", "retry_delay"}
    additions |= {"task_memory", "task_cpus", "task_pids", "task_network", "task_user", "max_output"}
    additions |= {"task_privileges", "data_hub"}
    additions |= {"cpus_per_task", "pin_tasks", "until", "max_runtime"}
    assert {name for _, name, _, _ in ROWS} | additions == FIELDS.keys()


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_defaults_are_those_of_ewms(name: str, value: Any) -> None:
    assert getattr(from_environment(), name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_an_empty_variable_is_no_variable(name: str) -> None:
    assert from_environment(**dict.fromkeys(variables_of(name), "")) == Settings()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512m", 2**29), ("2g", 2**31), ("2GB", 2**31), ("2 GiB", 2**31), ("1.5k", 1536), ("1T", 2**40), ("7b", 7)],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert from_environment(EWMS_PILOT_MAX_OUTPUT=text).max_output == size


def test_a_task_has_at_least_the_memory_that_an_engine_grants() -> None:
    assert from_environment(EWMS_PILOT_TASK_MEMORY="6m").limits == Limits(memory=6 * 2**20)


@pytest.mark.parametrize("word", ["y", "YES", "t", "True", "on", "1"])
def test_words_that_mean_true(word: str) -> None:
    assert from_environment(EWMS_PILOT_HTCHIRP=word).htchirp is True


@pytest.mark.parametrize("word", ["n", "NO", "f", "False", "off", "0"])
def test_words_that_mean_false(word: str) -> None:
    assert from_environment(EWMS_PILOT_STOP_LISTENING_ON_TASK_ERROR=word).stop_listening_on_task_error is False


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("EWMS_PILOT_PREFETCH", "two", "EWMS_PILOT_PREFETCH must be an integer ≥ 1, not 'two'"),
        ("EWMS_PILOT_PREFETCH", "0", "EWMS_PILOT_PREFETCH must be an integer ≥ 1, not '0'"),
        ("EWMS_PILOT_PREFETCH", "70000", "EWMS_PILOT_PREFETCH must be an integer ≤ 65535, not '70000'"),
        ("EWMS_PILOT_MAX_CONCURRENT_TASKS", "0", "EWMS_PILOT_MAX_CONCURRENT_TASKS must be an integer ≥ 1, or auto, not '0'"),
        ("EWMS_PILOT_TASK_TIMEOUT", "0", "EWMS_PILOT_TASK_TIMEOUT must be a number of seconds > 0, not '0'"),
        ("EWMS_PILOT_SUBPROC_TIMEOUT", "nan", "EWMS_PILOT_SUBPROC_TIMEOUT must be a number of seconds > 0, not 'nan'"),
        ("EWMS_PILOT_QUARANTINE_TIME", "-1", "EWMS_PILOT_QUARANTINE_TIME must be a number of seconds ≥ 0, not '-1'"),
        ("EWMS_PILOT_HTCHIRP", "maybe", "EWMS_PILOT_HTCHIRP must be a boolean (true or false), not 'maybe'"),
        (
            "EWMS_PILOT_HTCHIRP_DEST",
            "X",
            "EWMS_PILOT_HTCHIRP_DEST must be one of JOB_ATTR, JOB_EVENT_LOG, JOB_ATTR_DELAYED, not 'X'",
        ),
        ("EWMS_PILOT_INFILE_EXT", "a/b", "EWMS_PILOT_INFILE_EXT must be a file name extension such as .json, not 'a/b'"),
        (
            "EWMS_PILOT_CL_LOG",
            "loud",
            "EWMS_PILOT_CL_LOG must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL, not 'loud'",
        ),
        (
            "EWMS_PILOT_TASK_ARGS",
            "it's",
            'EWMS_PILOT_TASK_ARGS must be arguments that can be split as a shell would (No closing quotation), not "it\'s"',
        ),
        (
            "_EWMS_PILOT_CONTAINER_PLATFORM",
            "lxc",
            "_EWMS_PILOT_CONTAINER_PLATFORM must be one of auto, docker, podman, apptainer, bubblewrap, process, not 'lxc'",
        ),
        (
            "EWMS_PILOT_TASK_MEMORY",
            "much",
            "EWMS_PILOT_TASK_MEMORY must be a number of bytes such as 512m or 2g, or auto, not 'much'",
        ),
        (
            "EWMS_PILOT_TASK_MEMORY",
            "0",
            "EWMS_PILOT_TASK_MEMORY must be a number of bytes such as 512m or 2g, or auto, not '0'",
        ),
        (
            "EWMS_PILOT_TASK_MEMORY",
            "1k",
            "EWMS_PILOT_TASK_MEMORY must be a number of bytes ≥ 6m, such as 512m or 2g, or auto, not '1k'",
        ),
        ("EWMS_PILOT_TASK_CPUS", "0", "EWMS_PILOT_TASK_CPUS must be a number of CPUs > 0, not '0'"),
        ("EWMS_PILOT_TASK_CPUS", "inf", "EWMS_PILOT_TASK_CPUS must be a number of CPUs > 0, not 'inf'"),
        ("EWMS_PILOT_TASK_PIDS", "0", "EWMS_PILOT_TASK_PIDS must be an integer ≥ 1, or auto, not '0'"),
        (
            "EWMS_PILOT_QUEUE_INCOMING_BROKER_TYPE",
            "kafka",
            "EWMS_PILOT_QUEUE_INCOMING_BROKER_TYPE must be one of local, rabbitmq, nats, pulsar, not 'kafka'",
        ),
        (
            "EWMS_PILOT_QUEUE_OUTGOING_BROKER_TYPE",
            "nats;kafka",
            "EWMS_PILOT_QUEUE_OUTGOING_BROKER_TYPE must be one of local, rabbitmq, nats, pulsar, not 'nats;kafka'",
        ),
    ],
)
def test_a_wrong_value_is_an_error_of_one_line(variable: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        from_environment(**{variable: text})
    assert str(raised.value) == message
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "must be a JSON object (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ('{"A": null}', "must have strings, numbers or booleans as values, unlike A"),
        ('{"A": ["secret"]}', "must have strings, numbers or booleans as values, unlike A"),
        ('{"A": "secret\\u0000"}', "must have strings, numbers or booleans as values, unlike A"),
        ('{"A-B": "secret"}', "must have names of letters, digits and _ only, not 'A-B'"),
        ('{"1A": "secret"}', "must have names of letters, digits and _ only, not '1A'"),
    ],
)
def test_the_task_environment_is_checked_without_showing_values(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        from_environment(EWMS_PILOT_TASK_ENV_JSON=text)
    assert str(raised.value) == f"EWMS_PILOT_TASK_ENV_JSON {message} (the value is not shown)"


def test_prefetch_beyond_the_slots_allows_sending_together() -> None:
    few, many = (load({"queue_outgoing": "q", "max_concurrent_tasks": 4, "prefetch": each}, {}, NOWHERE) for each in (1, 10))
    assert [address.spare for address in (*few.outgoing(), *many.outgoing())] == [0, 6]
    assert many.at_broker("q").spare == 0  # `send` and `receive` wait for each message


@pytest.mark.parametrize("name", [name for name in FIELDS if FIELDS[name].metadata["secret"]])
def test_a_secret_is_in_no_message_and_no_repr(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        load({name: {"hunter2": ["hunter2"]}}, {}, tmp_path)
    assert "hunter2" not in str(raised.value).replace("not 'hunter2'", "").replace("unlike hunter2", "")
    assert raised.value.__cause__ is None
    settings = load({name: '{"A": "hunter2"}' if name.endswith("json") else "amqp://user:hunter2@host"}, {}, tmp_path)
    assert "hunter2" not in repr(settings)


def test_an_address_hides_its_token() -> None:
    assert "hunter2" not in repr(QueueAddress("q", "rabbitmq", "h", "hunter2"))


def test_a_long_wrong_value_is_shortened() -> None:
    with pytest.raises(SettingsError) as raised:
        from_environment(EWMS_PILOT_PREFETCH="9" * 1000)
    assert len(str(raised.value)) < 200


def test_quarantine_without_stopping_is_an_error() -> None:
    with pytest.raises(SettingsError, match="EWMS_PILOT_QUARANTINE_TIME holds the slot") as raised:
        from_environment(EWMS_PILOT_QUARANTINE_TIME="5", EWMS_PILOT_STOP_LISTENING_ON_TASK_ERROR="False")
    assert "\n" not in str(raised.value)


def test_the_new_name_of_the_task_timeout_precedes_the_old() -> None:
    assert from_environment(EWMS_PILOT_TASK_TIMEOUT="1", EWMS_PILOT_SUBPROC_TIMEOUT="2").task_timeout == 1


def test_infinite_timeouts_are_allowed() -> None:
    assert from_environment(EWMS_PILOT_TIMEOUT_QUEUE_INCOMING="inf").timeout_queue_incoming == math.inf


def test_flags_precede_variables_the_file_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "trio-pilot.toml").write_text("prefetch = 2\nmax-attempts = 2\ngrace = 2\n")
    environ = {"EWMS_PILOT_PREFETCH": "3", "EWMS_PILOT_MAX_ATTEMPTS": "3"}
    settings = load({"prefetch": "4"}, environ, tmp_path)
    assert (settings.prefetch, settings.max_attempts, settings.grace, settings.kill_grace) == (4, 3, 2, 2)


def test_the_file_may_hold_toml_values(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text(
        'task_args = ["a b", "c"]\ntask_env_json = {A = 1}\nqueue_incoming = ["q;r", "s"]\nhtchirp = true\n'
        'okay_errors = ["A"]\nexternal_directories = ["/a,b"]\ntask_timeout = 1.5\n'
    )
    settings = load({"config": str(tmp_path / "other.toml")}, {}, NOWHERE)
    assert settings.task_args == ("a b", "c")
    assert settings.task_env_json == {"A": "1"}
    assert settings.queue_incoming == ("q;r", "s")
    assert settings.htchirp is True
    assert settings.okay_errors == {"A"}
    assert settings.external_directories == (Path("/a,b"),)
    assert settings.task_timeout == 1.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prefetsch = 1", "has 'prefetsch', which is no setting; did you mean prefetch?"),
        ("config = 'x'", "has 'config', which is no setting"),
        ("prefetch = ", "cannot read the settings file"),
        ("prefetch = true", "prefetch in the TOML file must be an integer ≥ 1, not True"),
        ("data_dir_parent_path_on_host = [1]", "data_dir_parent_path_on_host in the TOML file must be a string, not [1]"),
        ("task_image = {a = 1}", "task_image in the TOML file must be a string"),
        ("\xff", "cannot read the settings file"),
    ],
)
def test_a_wrong_file_is_an_error_of_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "trio-pilot.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(SettingsError) as raised:
        load({}, {}, tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="settings file"):
        load({}, {"EWMS_PILOT_CONFIG": str(tmp_path / name)}, tmp_path)


def test_an_envfile_is_read_as_data_and_never_run(tmp_path: Path) -> None:
    witness = tmp_path / "x"
    (tmp_path / "ewms_htcondor_envfile.sh").write_text(
        "#!/bin/sh\n# it's EWMS's\n"
        "export EWMS_PILOT_TASK_IMAGE='$(touch x)'\n"
        f'export EWMS_PILOT_INIT_IMAGE="`touch {witness}`"\n'
        "export EWMS_PILOT_TASK_ARGS='say '\\''it'\\''; touch x'\n"
        f"touch {witness}\n"
        "export EWMS_PILOT_QUEUE_INCOMING='a;b'\nEWMS_PILOT_PREFETCH=7\n"
    )
    settings = load({}, environment({"EWMS_PILOT_PREFETCH": "1"}, tmp_path), NOWHERE)
    assert settings.task_image == "$(touch x)"
    assert settings.init_image == f"`touch {witness}`"
    assert settings.task_args == ("say", "it;", "touch", "x")
    assert settings.queue_incoming == ("a", "b")
    assert settings.prefetch == 7
    assert not witness.exists()
    assert not Path("x").exists()


def test_a_broken_envfile_is_an_error_without_its_content(tmp_path: Path) -> None:
    (tmp_path / "ewms_htcondor_envfile.sh").write_text("export TOKEN='hunter2")
    with pytest.raises(SettingsError, match=r"cannot read .*: No closing quotation") as raised:
        environment({}, tmp_path)
    assert "hunter2" not in str(raised.value)


def test_unknown_variables_also_of_the_envfile_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "ewms_htcondor_envfile.sh").write_text("export EWMS_PILOT_PREFETSCH='1'")
    environ = environment({"_EWMS_PILOT_CONTAINER_PLATFROM": "x", "HOME": "/", "EWMS_PILOT_ZZZZ": ""}, tmp_path)
    assert sorted(unknown_variables(environ)) == [
        "EWMS_PILOT_PREFETSCH is no setting; did you mean EWMS_PILOT_PREFETCH?",
        "EWMS_PILOT_ZZZZ is no setting",
        "_EWMS_PILOT_CONTAINER_PLATFROM is no setting; did you mean _EWMS_PILOT_CONTAINER_PLATFORM?",
    ]


def outgoing(**environ: str) -> list[QueueAddress]:
    return from_environment(**{f"EWMS_PILOT_QUEUE_OUTGOING{name}": text for name, text in environ.items()}).outgoing()


def test_queue_lists_are_aligned_by_position_with_empty_entries() -> None:
    found = outgoing(**{"": "a;b;c"}, _AUTH_TOKEN=";tok;", _BROKER_TYPE="local;;rabbitmq", _BROKER_ADDRESS=";u@h;")
    assert found == [
        QueueAddress("a", "local", "", ""),
        QueueAddress("b", "rabbitmq", "u@h", "tok"),
        QueueAddress("c", "rabbitmq", "localhost", ""),
    ]


def test_one_address_and_one_token_serve_all_queues() -> None:
    assert outgoing(**{"": "a;b"}, _AUTH_TOKEN="t", _BROKER_ADDRESS="h") == [
        QueueAddress("a", "rabbitmq", "h", "t"),
        QueueAddress("b", "rabbitmq", "h", "t"),
    ]


def test_queues_without_an_address_are_at_the_broker_of_all() -> None:
    settings = load({"broker": "amqp://h/v", "broker_token": "t", "queue_incoming": "q"}, {}, NOWHERE)
    assert settings.incoming() == [QueueAddress("q", "rabbitmq", "amqp://h/v", "t")]
    assert settings.at_broker("q") == settings.incoming()[0]


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("", "local"),
        ("/a/b", "local"),
        ("./q", "local"),
        ("x.sqlite", "local"),
        ("host", "rabbitmq"),
        ("u@h.db.org", "rabbitmq"),
        ("nats://token@host:4222", "nats"),
        ("TLS://host", "nats"),
        ("pulsar://host", "pulsar"),
        ("pulsar+ssl://host:6651", "pulsar"),
    ],
)
def test_the_address_tells_the_kind_of_a_broker(address: str, kind: str) -> None:
    assert load({"broker": address}, {}, NOWHERE).at_broker("q").broker == kind


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "EWMS_PILOT_QUEUE_OUTGOING must name a queue: set it, or give --queue-outgoing"),
        ({"": "a;;b"}, "EWMS_PILOT_QUEUE_OUTGOING must name a queue at each of its 3 positions"),
        ({"": "a;b;c", "_AUTH_TOKEN": "t;u"}, "EWMS_PILOT_QUEUE_OUTGOING_AUTH_TOKEN must have 1 or 3 values"),
        ({"": "a;b\udcff"}, "a queue's name must be UTF-8, not 'b\\udcff'"),
    ],
)
def test_missing_queues_are_an_error(environ: Mapping[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        outgoing(**environ)
    assert str(raised.value).startswith(message)


def test_the_wait_for_the_first_event_may_be_longer() -> None:
    assert from_environment(EWMS_PILOT_TIMEOUT_QUEUE_INCOMING="5").first_event_timeout == 5
    assert from_environment(EWMS_PILOT_TIMEOUT_QUEUE_WAIT_FOR_FIRST_MESSAGE="9").first_event_timeout == 9


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().prefetch = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", FIELDS)
def test_flags_are_named_as_settings(name: str) -> None:
    assert flag_of(name) == f"--{name.replace('_', '-')}"


def test_an_init_container_must_have_something_to_run(tmp_path: Path) -> None:
    environ = {
        "EWMS_PILOT_TASK_ARGS": "true",
        "EWMS_PILOT_QUEUE_INCOMING": "a",
        "EWMS_PILOT_QUEUE_OUTGOING": "b",
        "EWMS_PILOT_INIT_IMAGE": "/",
    }
    with pytest.raises(SettingsError, match=r"^EWMS_PILOT_INIT_ARGS must say what to run in EWMS_PILOT_INIT_IMAGE"):
        load({}, environ, tmp_path).check_complete()


@pytest.mark.parametrize("init_image", ["", "/cvmfs/an/image", "an:image"])
def test_an_image_may_run_the_command_of_its_own(tmp_path: Path, init_image: str) -> None:
    environ = {
        "EWMS_PILOT_TASK_IMAGE": "/cvmfs/an/image",
        "EWMS_PILOT_TASK_ARGS": "",
        "EWMS_PILOT_QUEUE_INCOMING": "a",
        "EWMS_PILOT_QUEUE_OUTGOING": "b",
        "EWMS_PILOT_INIT_IMAGE": init_image,
        "EWMS_PILOT_INIT_ARGS": "",
    }
    load({}, environ, tmp_path).check_complete()


@pytest.mark.parametrize("image", ["", "/"])
def test_a_task_must_have_something_to_run(tmp_path: Path, image: str) -> None:
    with pytest.raises(SettingsError, match=r"^EWMS_PILOT_TASK_ARGS must say what to run for each event: set it"):
        load({}, {"EWMS_PILOT_TASK_IMAGE": image}, tmp_path).check_complete()


def test_arguments_have_no_nul(tmp_path: Path) -> None:
    (tmp_path / "trio-pilot.toml").write_text('task-args = ["a\\u0000b"]\n')
    with pytest.raises(SettingsError, match="must be arguments without NUL characters"):
        load({}, {}, tmp_path)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, LONGEST_LEASE),
        ({"task_timeout": 100.0}, 100 + LEASE_MARGIN),
        ({"task_timeout": 100.0, "prefetch": 5, "max_concurrent_tasks": 2}, 300 + LEASE_MARGIN),
        ({"task_timeout": math.inf}, LONGEST_LEASE),
    ],
)
def test_a_lease_is_long_enough_for_events_that_wait_for_a_slot(given: dict[str, Any], seconds: float) -> None:
    assert Settings(**given).lease == seconds


@pytest.mark.parametrize("raw", ["net_raw, set-uid", "CAP_NET_RAW SET-UID", ["NET_RAW", "set-uid"]])
def test_privileges_of_tasks_are_named(raw: object) -> None:
    assert load({"task_privileges": raw}, {}, NOWHERE).task_privileges == {"NET_RAW", "set-uid"}


def test_a_privilege_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match="without 'root', not 'root'"):
        load({"task_privileges": "root"}, {}, NOWHERE)


def test_secrets_and_files_of_other_events_are_hidden_from_tasks(tmp_path: Path) -> None:
    flags = {"broker_token": "@/a/token", "broker": "./queues.db", "data_dir_parent_path_on_host": str(tmp_path)}
    hidden = set(load(flags, {}, NOWHERE).runtime_options.hidden)
    assert hidden >= {
        Path("trio-pilot.toml"),
        Path("ewms_htcondor_envfile.sh"),
        Path("/a/token"),
        Path("queues.db").absolute(),
    }
    assert hidden >= {tmp_path / "ewms-pilot-data", tmp_path / "ewms-pilot-dead-letters"}
