"""Who may import whom. STYLE and doc/source/contributor say why; this says that it is so."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nova_ftvm"
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
           for path in PACKAGE.rglob("*.py")}

#: May use nothing but the standard library, each other, and in these numpy.
PURE = ("nova_ftvm.core", "nova_ftvm.types", "nova_ftvm.exception", "nova_ftvm.ports")
PURE_MAY = {*sys.stdlib_module_names, "numpy", *PURE}

#: Importer -> what it must never import.
NEVER = {
    "nova_ftvm.engine": ("nova_ftvm.host", "nova", "libvirt", "nova_ftvm.cloud", "nova_ftvm.failover", "nova_ftvm.db"),
    "nova_ftvm.host": ("nova_ftvm.engine", "nova_ftvm.failover", "nova_ftvm.rpc", "nova_ftvm.cloud", "nova",
                       "nova_ftvm.db", "oslo_messaging", "oslo_config"),
    "nova_ftvm.failover": ("nova_ftvm.engine", "nova_ftvm.host", "nova_ftvm.cloud", "nova", "libvirt"),
    "nova_ftvm.rpc": ("nova_ftvm.engine", "nova_ftvm.host", "nova_ftvm.failover", "nova_ftvm.cloud", "nova"),
    "nova_ftvm.cloud": ("nova_ftvm.engine", "nova_ftvm.host", "nova_ftvm.failover", "nova_ftvm.db"),
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(path: Path) -> set[str]:
    """Absolute names of all that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(of: str) -> set[str]:
    return {module for module, path in MODULES.items() if any(within(name, of) for name in imports(path))}


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 40
    assert "nova_ftvm.host.memory" in importers("numpy")
    assert "nova_ftvm.exception.FtvmError" in imports(PACKAGE / "engine" / "link.py")


def test_the_core_imports_nothing_but_the_standard_library_and_numpy() -> None:
    for module, path in MODULES.items():
        if any(within(module, pure) for pure in PURE):
            outside = {name for name in imports(path)
                       if name.split(".")[0] not in PURE_MAY and not any(within(name, pure) for pure in PURE)}
            assert not outside, f"{module} imports {outside}"


def test_the_core_neither_waits_nor_opens() -> None:
    for module, path in MODULES.items():
        if within(module, "nova_ftvm.core"):
            doing = imports(path) & {"os", "socket", "time", "subprocess", "threading", "select", "logging", "io"}
            assert not doing, f"{module} imports {doing}"


@pytest.mark.parametrize("package", NEVER)
def test_a_room_does_not_import_what_it_must_not_know(package: str) -> None:
    for module, path in MODULES.items():
        if within(module, package):
            wrong = {name for name in imports(path) for banned in NEVER[package] if within(name, banned)}
            assert not wrong, f"{module} imports {wrong}"


def test_only_cloud_imports_nova() -> None:
    # cmd.compute stands in nova-compute's place; it imports nothing but Nova's own entry point.
    assert {m for m in importers("nova") if not within(m, "nova_ftvm.cloud")} <= {"nova_ftvm.cmd.compute"}


def test_nobody_imports_cmd_but_cmd() -> None:
    assert {m for m in importers("nova_ftvm.cmd") if not within(m, "nova_ftvm.cmd")} == set()


def test_libvirt_is_imported_in_one_place() -> None:
    assert {m for m in importers("libvirt") if not within(m, "nova_ftvm.cloud")} == {"nova_ftvm.host.libvirt"}
