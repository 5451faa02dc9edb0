"""Import compiled modules from an archive. Python cannot do that by itself, so each is written to a temporary file."""

import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from zipimport import zipimporter


class Extensions:
    """Finds the compiled modules in a folder of an archive. It belongs at the end of `sys.meta_path`."""

    def __init__(self, archive: zipimporter, folder: str) -> None:
        self._archive = archive
        self._folder = folder

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module, or None, as the import system requires."""
        with suppress(OSError):
            code = self._archive.get_data(f"{self._folder}/{name.replace('.', '/')}{EXTENSION_SUFFIXES[0]}")
            return spec_from_loader(name, _Loader(name, code))
        return None


class _Loader(ExtensionFileLoader):
    def __init__(self, name: str, code: bytes) -> None:
        super().__init__(name, name)
        self._code = code

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Load the module from memory, for which no disk is needed; where that is forbidden, from a directory."""
        try:
            return self._load(spec, _in_memory(self.name, self._code))
        except (OSError, ImportError):
            from tempfile import TemporaryDirectory

            # No other user can have made the directory, or open it; it is removed before anything else runs.
            where = os.environ.get("_CONDOR_SCRATCH_DIR", ".")
            with TemporaryDirectory(prefix=".trio-pilot-", dir=where, ignore_cleanup_errors=True) as directory:
                file = Path(directory, "module.so")
                file.write_bytes(self._code)
                return self._load(spec, str(file.absolute()))

    def _load(self, spec: ModuleSpec, path: str) -> ModuleType:
        spec.origin = path
        return super().create_module(spec)


def _in_memory(name: str, code: bytes) -> str:
    """Return the path of a file in memory. It stays open: the dynamic linker recognises loaded modules by their paths."""
    descriptor = os.memfd_create(name)
    os.write(descriptor, code)
    return f"/proc/self/fd/{descriptor}"
