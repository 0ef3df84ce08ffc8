"""Axolotl's DPO (rl: dpo) as ours: the objective, and its data sets of chosen and rejected answers."""

from __future__ import annotations

from typing import Any

from distlora.config import UserError
from distlora_launcher.importing.axolotl_templates import template_of
from distlora_launcher.importing.keys import Keys
from distlora_launcher.importing.recipe import Imported

AS_THEY_ARE = ("", "passthrough", "user_defined.default")
"""Types whose texts go to the tokenizer as the data has them, unless a format is set."""


def convert_objective(keys: Keys, imported: Imported) -> None:
    """train.objective and its beta. Raises UserError for what is trained otherwise than by the next token or DPO."""
    kind = keys.text("rl")
    if kind is None:
        return
    if kind != "dpo":
        raise UserError(
            f"rl={kind}: of preference and reinforcement learning distlora has DPO alone; set rl: dpo, or remove the "
            "key to import the supervised fine-tuning that is left"
        )
    if keys.text("adapter") is None:
        raise UserError(
            "rl=dpo without an adapter: Axolotl keeps a second model as the reference, and distlora takes the base "
            "under the adapter; set adapter: qlora"
        )
    beta = keys.number("rl_beta", "dpo_beta")
    imported.section("train").update(objective="dpo", dpo_beta=0.1 if beta is None else beta)


def preference_columns(
    entry: Keys, imported: Imported, template: str | None, jinja: str | None
) -> tuple[dict[str, Any], bool, str | None]:
    """(data.columns, whether a chat template renders it, data.template) of a data set of pairs."""
    kind = entry.any("type")
    if isinstance(kind, dict):  # A format of the user's own has its fields under type.
        fields = Keys({str(key): value for key, value in kind.items()}, place=f"{entry.place}type.")
        return _texts(fields, imported), False, None
    name = str(kind or "")
    base, _, form = name.partition(".")
    if base == "chat_template" and form in ("", "default", "argilla_chat"):
        _check_roles(entry, imported)
        prompt = {} if form == "argilla_chat" else {"prompt": entry.text("field_messages") or "messages"}
        own, own_jinja = entry.text("chat_template"), entry.text("chat_template_jinja")
        columns = _renamed(prompt | _answers(entry))
        return columns, True, template_of(own or template, own_jinja if own else jinja, imported)
    if base in ("chatml", "llama3") and form in ("ultra", "argilla_chat"):
        return _renamed(_answers(entry)), True, template_of(base, None, imported)
    if name in AS_THEY_ARE:
        return _texts(entry, imported), False, None
    imported.note(
        "refused",
        f"{entry.place}type={name}",
        "strings stay text here, and Axolotl makes turns of them; write prompt, chosen and rejected as lists of "
        "messages, which data.template renders",
    )
    return {}, False, None


def _texts(fields: Keys, imported: Imported) -> dict[str, Any]:
    """Columns of texts; formats that add anything to them have no equal."""
    columns = {"prompt": fields.text("field_prompt") or "prompt", **_answers(fields)}
    fields.any("field_system")
    for key, column in columns.items():
        layout = fields.text(f"{key}_format")
        if layout not in (None, f"{{{key}}}", f"{{{column}}}"):
            imported.note(
                "refused", f"{fields.place}{key}_format", f"nothing is put around {column}; do so in the data"
            )
    if fields.place.endswith("type."):
        for name, _ in fields.unread():
            imported.note("unknown", f"{fields.place}{name}", "Axolotl has no such key")
    return _renamed(columns)


def _answers(entry: Keys) -> dict[str, str]:
    return {side: entry.text(f"field_{side}") or side for side in ("chosen", "rejected")}


def _renamed(columns: dict[str, str]) -> dict[str, Any]:
    """Those columns that have another name than the key."""
    return {key: column for key, column in columns.items() if key != column}


def _check_roles(entry: Keys, imported: Imported) -> None:
    """Messages are read with role and content, or with from and value."""
    mapping = {str(key): str(value) for key, value in entry.mapping("message_property_mappings").items()}
    names = tuple(entry.text(f"message_field_{ours}") or mapping.get(ours, ours) for ours in ("role", "content"))
    if names not in (("role", "content"), ("from", "value")):
        imported.note(
            "refused",
            f"{entry.place}message_property_mappings",
            f"rename {names[0]} and {names[1]} to role and content",
        )
    for ours, theirs in entry.mapping("roles").items():
        words = [str(word) for word in (theirs if isinstance(theirs, list) else [theirs])]
        odd = [word for word in words if word != ours]
        if odd and names[0] == "role":
            imported.note("refused", f"{entry.place}roles.{ours}", f"rename {', '.join(odd)} to {ours} in the data")
