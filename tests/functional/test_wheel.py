"""What pip installs: the driver's door beside Nova, and nothing that would hide Nova."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

TREE = pathlib.Path(__file__).parents[2]
#: All that the build reads; a copy without git, as a release's source archive is.
PARTS = ("nova", "nova_ftvm", "etc", "setup.cfg", "setup.py", "pyproject.toml", "requirements.txt", "README.rst")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        source = TREE / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / part)
        else:
            (folder / part).touch()
    subprocess.run([sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "-w", folder,
                    folder], check=True, env={**os.environ, "PBR_VERSION": "1.0.0"}, capture_output=True, timeout=200)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_the_door_and_no_nova_of_its_own(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("nova/")]
    assert names == ["nova/virt/ftvm/__init__.py"]


def test_the_metadata_definitions_are_installed_for_glance(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = sorted(name.rsplit("/", 1)[1] for name in archive.namelist() if "/etc/nova-ftvm/metadefs/" in name)
    assert found == ["ftvm-flavor.json", "ftvm-server.json"]


def test_nova_loads_the_driver_through_the_door(wheel, tmp_path):
    """With the wheel unpacked into Nova's own site-packages, of which a copy of links stands in here."""
    import nova
    installed = pathlib.Path(nova.__file__).parent
    site = tmp_path / "site"
    (site / "nova" / "virt").mkdir(parents=True)
    for here, there in ((installed, site / "nova"), (installed / "virt", site / "nova" / "virt")):
        for entry in here.iterdir():
            if entry.name not in ("virt", "ftvm", "__pycache__"):
                (there / entry.name).symlink_to(entry)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    loads = ("import nova.conf; nova.conf.CONF([], project='nova'); from nova.virt import driver, fake; "
             "from oslo_utils import importutils; "
             "found = importutils.import_class('nova.virt.ftvm.FTVMLibvirtDriver'); "
             "print(issubclass(found, driver.ComputeDriver), found.__module__)")
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", loads], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(site), "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true"},
                         timeout=120, check=False)
    assert ran.stdout.strip() == "True nova_ftvm.cloud.driver", ran.stderr


def test_the_entry_script_makes_the_door_itself(tmp_path):
    """Where Nova's tree cannot take the package, as with an editable Nova."""
    script = ("import sys, nova.cmd.compute as nova_compute; from nova_ftvm.cmd import compute; "
              "nova_compute.main = lambda: print(sys.modules['nova.virt.ftvm'].FTVMLibvirtDriver.__name__); "
              "compute.main()")
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(TREE), "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true"},
                         timeout=120, check=False)
    assert ran.stdout.strip() == "FTVMLibvirtDriver", ran.stderr
