"""Load the settings of a command from its flags, the environment and the working directory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trio_pilot import log
from trio_pilot.files.filesystem import is_file
from trio_pilot.files.trusted_text import is_public
from trio_pilot.log import LOGGER
from trio_pilot.runtimes import ENVFILE
from trio_pilot.settings import CONFIG_FILE, TOKENS, Settings, environment, load, unknown_variables


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Return the settings, and set up logging by them. Raises SettingsError."""
    directory = Path.cwd()
    environ = environment(os.environ, directory)
    settings = load(flags, environ, directory)
    log.set_up(settings.cl_log, settings.cl_log_third_party)
    for warning in unknown_variables(environ):
        LOGGER.warning(warning)
    _log_files(settings, directory)
    return settings


def _log_files(settings: Settings, directory: Path) -> None:
    """Log each file that was read, and warn of those with tokens that all users may read."""
    config = settings.config or directory / CONFIG_FILE
    read = [file for file in (directory / ENVFILE, config) if is_file(file)]
    for file in read:
        LOGGER.info("settings are read from %s", file)
    tokens = [token for name in TOKENS for token in settings.tokens_of(name) if token]
    in_files = settings.token_files
    for file in [*in_files, *(read if len(tokens) > len(in_files) else ())]:
        if is_public(file):
            LOGGER.warning("all users may read %s, which may have a token: close it with chmod go-r", file)
