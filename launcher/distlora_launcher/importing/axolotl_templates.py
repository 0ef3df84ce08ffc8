"""Axolotl's chat templates, and those of ours that write the same text."""

from __future__ import annotations

from distlora_launcher.importing.recipe import Imported

TEMPLATES = {"llama3": "llama3", "gemma": "gemma", "phi_3": "phi3", "mistral_v2v3": "mistral"}
"""Templates of Axolotl, and those of ours that render user and assistant turns to the same text."""
NEAR_TEMPLATES = {
    "chatml": ("chatml", "begins with the beginning-of-text token where the tokenizer adds one to every text"),
    "phi_35": ("phi3", "begins with the beginning-of-text token where the tokenizer adds one to every text"),
    "alpaca": ("alpaca", "opens with Alpaca's sentence where there is no system message"),
}
TOKENIZERS_OWN = "tokenizer_default"


def template_of(name: str | None, jinja: str | None, imported: Imported) -> str | None:
    """data.template for chat_template=`name`; `jinja` is chat_template_jinja."""
    if name == "jinja" and jinja is not None and jinja.endswith(".jinja") and "\n" not in jinja:
        return jinja
    if name == "jinja":
        imported.note("unsupported", "chat_template_jinja", "save it as FILE.jinja and set data.template=FILE.jinja")
        return None
    if name is None or name == TOKENIZERS_OWN:
        return None
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name in NEAR_TEMPLATES:
        ours, difference = NEAR_TEMPLATES[name]
        note = ("differs", f"chat_template={name}", f"data.template={ours} {difference}")
    else:
        ours = None
        note = (
            "unsupported",
            f"chat_template={name}",
            "the tokenizer's own is used; data.template takes a .jinja file",
        )
    if all((seen.group, seen.key, seen.reason) != note for seen in imported.notes):
        imported.note(*note)  # type: ignore[arg-type]
    return ours
