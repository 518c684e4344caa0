"""`rayk settings`: list every key of a config with its type, default and description."""

import textwrap

from rayk.config.reference import Section, find_sections

_INTRODUCTION = """\
# Settings

Every key of a run's YAML file, with its type, default and description. Generated from the sections' docstrings in this
folder by `rayk settings --markdown`; `rayk settings SECTION` prints a section on the terminal. A section with several
kinds has the keys of the `kind` that is chosen.
"""


def format_settings(place: str | None = None, width: int = 100) -> str:
    """Return the settings as text: those of the sections at and below `place`; by default the top-level keys.

    Raises:
        InputError: there is no such section.
    """
    if place is None:
        note = "Keys of a section: rayk settings SECTION, such as data, data.train, method.on_policy or rollouts."
        return "\n".join([*_lines(find_sections()[0], width), "", note])
    return "\n\n".join("\n".join(_lines(section, width)) for section in find_sections(place))


def settings_markdown() -> str:
    """Return the page with all settings, `rayk/config/README.md`."""
    parts = [_INTRODUCTION]
    for section in find_sections():
        parts.append(f"## {_heading(section)}\n\n{section.description}\n")
        if section.same_as is not None:
            parts.append(f"The same keys as `{section.same_as}`.\n")
            continue
        rows = [
            f"| `{setting.key}` | {_cell(setting.type)} | {_cell(setting.default)} | {_cell(setting.description)} |"
            for setting in section.settings
        ]
        parts.append("\n".join(["| key | type | default | description |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _heading(section: Section) -> str:
    place = f"`{section.place}`" if section.place else "Top level"
    return f"{place}, `kind: {section.kind}`" if section.kind else place


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _lines(section: Section, width: int) -> list[str]:
    lines = [section.title, *textwrap.wrap(section.description, width)]
    if section.same_as is not None:
        return [*lines, f"The same keys as {section.same_as}."]
    for setting in section.settings:
        default = f", default {setting.default}" if setting.default not in ("", "required") else ""
        needed = ", required" if setting.default == "required" else ""
        lines.append(f"  {setting.key}: {setting.type}{default}{needed}")
        lines += textwrap.wrap(setting.description, width, initial_indent="      ", subsequent_indent="      ")
    return lines
