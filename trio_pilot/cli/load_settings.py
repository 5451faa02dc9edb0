"""Load the settings of a command from its flags, the environment and the working directory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trio_pilot import log
from trio_pilot.log import LOGGER
from trio_pilot.settings import Settings, environment, load, unknown_variables


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Return the settings, and set up logging by them. Raises SettingsError."""
    directory = Path.cwd()
    environ = environment(os.environ, directory)
    settings = load(flags, environ, directory)
    log.set_up(settings.cl_log, settings.cl_log_third_party)
    for warning in unknown_variables(environ):
        LOGGER.warning(warning)
    return settings
