"""Files of other tools, imported."""

from pathlib import Path

from distlora.config import Config
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.importing.recipe import Imported, recipe_text


def composed(imported: Imported, folder: Path) -> Config:
    """Return the Config that `distlora train --config-dir FOLDER recipe=imported` runs."""
    place = folder / "recipe" / "imported.yaml"
    place.parent.mkdir(exist_ok=True)
    place.write_text(recipe_text(imported, source=Path("theirs.yml")))
    return compose_config(["recipe=imported"], config_dir=str(folder))


def reported(imported: Imported, group: str) -> list[str]:
    """Return the keys of a group of the report."""
    return [note.key for note in imported.notes if note.group == group]


def lost(imported: Imported) -> list[str]:
    """Return the keys without which the run is another one."""
    return reported(imported, "unsupported") + reported(imported, "refused")
