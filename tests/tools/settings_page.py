"""Write docs/settings_reference.md: `python tests/tools/settings_page.py > docs/settings_reference.md`."""

from __future__ import annotations

from distlora.config.base import cache_root
from distlora.config.field_docs import Setting, sections

HEAD = """# Settings reference

Every setting of `distlora train`, as typed on the command line (`optim.lr=1e-4`), in a YAML file
(`distlora train mine.yaml`) or from Python. `distlora train --cfg job` prints the settings of a command;
[settings](settings.md) explains those that matter first. This page is generated from `distlora/config/`.
"""


def page() -> str:
    """Return the page: a table per section."""
    parts = [HEAD]
    for name, summary, settings in sections():
        parts += [f"## {name or 'run'}", summary, ""]
        parts += ["| setting | values | default | meaning |", "|---|---|---|---|"]
        parts += [row(setting) for setting in settings]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def row(setting: Setting) -> str:
    """Return a setting's line. A `|` of the text would end a cell."""
    default = setting.default.replace(str(cache_root()), "~/.cache/distlora").replace("\n", "\\n")
    cells = (setting.values, f"`{default}`" if default else "required", setting.doc)
    return f"| `{setting.name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
