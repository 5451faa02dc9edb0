from pathlib import Path

import pytest

from trio_pilot.files import lasting
from trio_pilot.files.lasting import is_lasting


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The directories of these tests are themselves below /tmp, and may be in a container or in memory.
    monkeypatch.setattr(lasting, "SHARED_TEMPORARY", (str(tmp_path / "tmp"),))
    monkeypatch.setattr(lasting, "OF_CONTAINERS", ())
    return tmp_path


def test_outside_of_a_batch_job_each_directory_lasts(home: Path) -> None:
    assert is_lasting(home / "tmp/letters", {"TMPDIR": str(home)})


@pytest.mark.parametrize(
    "path", ["scratch", "scratch/letters", "scratch/a/b/c", "link/letters", "tmp/letters", "own/letters"]
)
def test_what_a_job_has_for_itself_goes_with_it(home: Path, path: str) -> None:
    (home / "scratch").mkdir()
    (home / "link").symlink_to(home / "scratch")
    assert not is_lasting(home / path, {"_CONDOR_SCRATCH_DIR": str(home / "scratch"), "TMPDIR": str(home / "own")})


@pytest.mark.parametrize("path", ["letters", "scratch-of-another", "scratch/../letters"])
def test_a_directory_outside_of_the_scratch_directory_lasts(home: Path, path: str) -> None:
    assert is_lasting(home / path, {"_CONDOR_SCRATCH_DIR": str(home / "scratch")})


@pytest.mark.parametrize("job", ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "SGE_TASK_ID"])
def test_the_temporary_directory_of_any_batch_job_goes_with_it(home: Path, job: str) -> None:
    environ = {job: "7", "TMPDIR": str(home / "own")}
    assert not is_lasting(home / "own/letters", environ)
    assert not is_lasting(home / "tmp/letters", environ)
    assert is_lasting(home / "letters", environ)


def test_the_file_system_of_a_container_ends_with_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert is_lasting(home / "letters", environ)
    monkeypatch.setattr(lasting, "OF_CONTAINERS", ("proc",))
    assert not is_lasting(Path("/proc/letters/of/mine"), environ)
