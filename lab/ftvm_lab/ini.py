"""The form of a configuration file: sections of options, as oslo.config reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Section = Mapping[str, str | int | Path | Sequence[str]]
Sections = Mapping[str, Section]


def render(sections: Sections) -> str:
    """A list becomes one line per item: oslo.config's multi-valued options."""
    lines: list[str] = []
    for name, options in sections.items():
        lines.append(f"[{name}]")
        for option, value in options.items():
            items = value if isinstance(value, list | tuple) else [value]
            lines += [f"{option} = {item}" for item in items]
    return "\n".join(lines) + "\n"


def write(path: Path, sections: Sections) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(sections))
