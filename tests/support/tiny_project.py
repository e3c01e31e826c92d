"""A Python project whose build backend is its own: it needs no index to be built, as a wheel or editable."""

from __future__ import annotations

BACKEND = """
import os, zipfile

NAME = {name!r}
INFO = f"{{NAME}}-1.0.dist-info"


def _wheel(folder, files):
    file = f"{{NAME}}-1.0-py3-none-any.whl"
    scripts = f"[console_scripts]\\n{{NAME}}-run = {{NAME}}:main\\n"
    needs = "".join(f"Requires-Dist: {{one}}\\n" for one in {needs!r})
    files = {{
        **files,
        f"{{INFO}}/METADATA": f"Metadata-Version: 2.1\\nName: {{NAME}}\\nVersion: 1.0\\n{{needs}}",
        f"{{INFO}}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{{INFO}}/entry_points.txt": scripts,
    }}
    record = "".join(f"{{name}},,\\n" for name in files) + f"{{INFO}}/RECORD,,\\n"
    with zipfile.ZipFile(os.path.join(folder, file), "w") as wheel:
        for name, text in {{**files, f"{{INFO}}/RECORD": record}}.items():
            wheel.writestr(name, text)
    return file


def build_wheel(folder, config_settings=None, metadata_directory=None):
    {imports}
    return _wheel(folder, {{f"{{NAME}}.py": open(f"{{NAME}}.py").read()}})


def build_editable(folder, config_settings=None, metadata_directory=None):
    {imports}
    return _wheel(folder, {{f"_{{NAME}}.pth": os.getcwd() + "\\n"}})
"""

PYPROJECT = """
[project]
name = "{name}"
version = "1.0"
requires-python = ">=3.10"
dependencies = {needs}

[project.scripts]
{name}-run = "{name}:main"

[build-system]
requires = {requires}
build-backend = "backend"
backend-path = ["."]
"""

MODULE = """
value = {value}

def main():
    from importlib.metadata import version
    print("{name}", value, version("{name}"))
"""


def tiny_project(
    name: str, value: int, *, needs: tuple[str, ...] = (), requires: tuple[str, ...] = (), more: str = ""
) -> dict[str, str]:
    """Return the files of a project with one module, whose `value` and `main` a job can use.

    Args:
        name: of the project and its module; its command is ``<name>-run``.
        value: what the module holds.
        needs: other packages that it needs.
        requires: packages that it is built with, each of one module.
        more: lines at the end of ``pyproject.toml``.
    """
    imports = f"import {', '.join(requires)}" if requires else "pass"
    listed = {key: str(list(given)).replace("'", '"') for key, given in (("needs", needs), ("requires", requires))}
    return {
        "pyproject.toml": PYPROJECT.format(name=name, **listed) + more,
        "backend.py": BACKEND.format(name=name, needs=list(needs), imports=imports),
        f"{name}.py": MODULE.format(name=name, value=value),
    }
