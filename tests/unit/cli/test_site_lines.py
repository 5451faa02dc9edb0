import os
from pathlib import Path

from trio_pilot.cli.site_lines import site_lines

HOST = f"HOST={os.uname().nodename}"


def test_the_site_in_the_environment_is_told() -> None:
    environ = {"GLIDEIN_ResourceName": "ICE-CE1", "GLIDEIN_Site": "South\nPole", "OTHER": "x"}
    assert list(site_lines(environ)) == ["GLIDEIN_Site=South Pole", "GLIDEIN_ResourceName=ICE-CE1", HOST]


def test_the_site_in_the_machines_ad_is_told(tmp_path: Path) -> None:
    (ad := tmp_path / "machine.ad").write_text(
        'GLIDEIN_Site = "Madison"\nGLIDEIN_Entry_Name = "entry-1"\nGLIDEIN_ToDie = 1\n'
    )
    environ = {"_CONDOR_MACHINE_AD": str(ad), "GLIDEIN_Site": "Pole"}
    assert list(site_lines(environ)) == ["GLIDEIN_Site=Pole", "GLIDEIN_Entry_Name=entry-1", HOST]


def test_nothing_secret_is_told() -> None:
    environ = {
        "GLIDEIN_Site": "Pole",
        "GLIDEIN_Proxy": "hunter2",
        "GLIDEIN_IDTOKEN": "hunter2",
        "GLIDEIN_Site_Secret": "hunter2",
    }
    assert list(site_lines(environ)) == ["GLIDEIN_Site=Pole", HOST]


def test_a_job_without_a_site_tells_its_host() -> None:
    assert list(site_lines({"_CONDOR_SCRATCH_DIR": "/scratch"})) == [HOST]


def test_outside_of_a_job_nothing_is_told() -> None:
    assert list(site_lines({"HOME": "/root"})) == []
