import re

from tests.support.paths import ROOT
from trio_pilot.cli.exit_codes import SOFTWARE_ERROR
from trio_pilot.errors import BrokerError, NodeError, SettingsError, TasksFailedError, UsageError
from trio_pilot.settings import FIELDS, markdown_table

README = (ROOT / "README.md").read_text()


def shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_table_of_settings_agrees_with_the_code() -> None:
    found = re.search(r"<!-- settings: .*? -->\n(.*?)\n<!-- end of settings -->", README, re.DOTALL)
    assert found
    assert found[1] == markdown_table()


def test_every_setting_has_a_meaning_and_fits_its_table() -> None:
    for name, field in FIELDS.items():
        assert field.metadata["meaning"], name
        assert "|" not in field.metadata["meaning"], name


def test_the_exit_codes_agree_with_the_code() -> None:
    section = README.split("## Exit codes")[1].split("##")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    errors = {error.exit_code for error in (BrokerError, NodeError, SettingsError, TasksFailedError, UsageError)}
    assert codes == {0, SOFTWARE_ERROR} | errors


def test_the_set_up_is_two_commands_of_one_line_each() -> None:
    # .ci/run runs them; the other blocks are run by tests/integration/test_command_line.py.
    install, tests, *_ = shell_blocks()
    assert install.count("\n") == tests.count("\n") == 1
    assert install.endswith("trio-pilot demo\n")
    assert (ROOT / tests.split()[1]).exists()


def test_there_are_as_many_other_blocks_as_tests_run() -> None:
    assert len(shell_blocks()) == 2 + 4
