"""Chat templates: which one a run uses, whether the tokenizer can write it, and chats as text with the turns to train.

The named templates are the files of chat_templates/, written for this project; each marks the assistant's parts with
{% generation %}. A turn is what the template marks so, else what the conversation up to it has beyond its prompt. What
cannot be had so is refused by the document's place and the message. The table and `template_source` need neither torch
nor transformers, so that the launcher can refuse a name; rendering imports transformers.
"""

import contextlib
import functools
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from distlora.config import UserError, nearest
from distlora.data.formats import MASK_KEYS

Message = dict[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "_7f3a91"
"""End of the names of tools in a rendering that shows which of them a template writes."""
_BOS_LINE = "{{- bos_token }}\n"
"""First line of a named template; it stays where the tokenizer itself puts that token in front of a text."""
RENDER_SECONDS, RENDER_GIB, MOST_CHARACTERS = 5.0, 1.0, 2**26
"""CPU time, memory and text of one conversation's rendering: a template may loop without end."""


NAMED = {
    "chatml": "<|im_start|> <|im_end|>",
    "llama3": "<|start_header_id|> <|end_header_id|> <|eot_id|>",
    "llama4": "<|header_start|> <|header_end|> <|eot|>",
    **dict.fromkeys(("mistral", "mistral_tekken"), "[INST] [/INST]"),
    "mistral_v7": "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [INST] [/INST]",
    "gemma": "<start_of_turn> <end_of_turn>",
    **dict.fromkeys(("phi3", "phi4_mini"), "<|system|> <|user|> <|assistant|> <|end|>"),
    "phi4": "<|im_start|> <|im_sep|> <|im_end|>",
    "command_r": "<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|END_OF_TURN_TOKEN|>",
    "granite": "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
    **dict.fromkeys(("deepseek3", "deepseek_v2"), "<\uff5cUser\uff5c> <\uff5cAssistant\uff5c>"),
    **dict.fromkeys(("llama2", "zephyr", "vicuna", "alpaca", "mistral_v1", "deepseek"), ""),
    **dict.fromkeys(("qwen25", "qwen3", "falcon_h1"), "<|im_start|> <|im_end|>"),
}
"""`data.template` by name, and its markers, which must be one token each: the model is stopped at them, and learns
nothing from their letters. Those without any write their roles in plain text."""
TOOL_MARKERS = {
    "mistral": "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
    **dict.fromkeys(("chatml", "llama3", "qwen25", "qwen3"), ""),
}
"""Named templates that write tools, their calls and results, and the markers that these need beside the others."""
ALIASES = {
    "mistral_v2v3": "mistral",
    **dict.fromkeys(("mistral_v3_tekken", "ministral", "ministral3", "pixtral"), "mistral_tekken"),
    **dict.fromkeys(("mistral_v7_tekken", "mistral_small"), "mistral_v7"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3n"), "gemma"),
    **dict.fromkeys(("phi_3", "phi_35", "phi"), "phi3"),
    **dict.fromkeys(("qwen_25", "qwen"), "qwen25"),
    **dict.fromkeys(("qwen3_nothink", "yi", "smollm"), "chatml"),
    **dict.fromkeys(("cohere", "aya"), "command_r"),
    "phi_4": "phi4",
    "granite3": "granite",
    "deepseek_v3": "deepseek3",
}
"""Names of Axolotl and LLaMA-Factory for the templates above."""
OF_TOKENIZER = {
    "tokenizer_default": "",
    **dict.fromkeys(("qwen3_5", "qwen3_6", "qwen2_vl", "qwen3_vl", "nemotron_h", "smollm2", "lfm2"), "<|im_start|>"),
    **dict.fromkeys(("gemma4", "gemma4_unified", "gemma4n"), "<|turn>"),
    **dict.fromkeys(("exaone", "exaone4"), "[|endofturn|]"),
    **dict.fromkeys(("command_a", "command_a_tool_use", "command_a_rag"), "<|START_OF_TURN_TOKEN|>"),
    **dict.fromkeys(("llama3_2_vision", "mllama"), "<|start_header_id|>"),
    **dict.fromkeys(("glm4", "glm4_moe", "glm4_7", "glmz1"), "[gMASK]"),
    "deepseekr1": "<\uff5cAssistant\uff5c>",
    "gpt_oss": "<|channel|>",
    "granite4": "<|start_of_role|>",
    "jamba": "<|bom|>",
    "llava": "USER:",
}
"""Names that mean the tokenizer's own template -> text that the family's own template always contains."""
FALLBACK_PREFIX = "tokenizer_default_fallback_"
TOOLS_ADVICE = f"set data.template to one that knows tools ({', '.join(TOOL_MARKERS)}, or a .jinja file of your own)"


class TemplateChoice(NamedTuple):
    """Meaning of data.template."""

    replacement: str | None
    """Name in NAMED, or path of a .jinja file; None: the tokenizer's own template."""
    marker: str = ""
    """Text of the family that the tokenizer's own template must have."""
    is_fallback: bool = False
    """True if `replacement` is used only for a tokenizer without a template."""


def template_choice(template: str | None) -> TemplateChoice:
    """Return the meaning of `data.template`. Raises UserError for an unknown name and for a file that is absent."""
    if template is None:
        return TemplateChoice(None)
    if template in OF_TOKENIZER:
        return TemplateChoice(None, OF_TOKENIZER[template])
    if template.startswith(FALLBACK_PREFIX):
        return template_choice(template.removeprefix(FALLBACK_PREFIX))._replace(is_fallback=True)
    if template in NAMED or template in ALIASES:
        return TemplateChoice(ALIASES.get(template, template))
    known = (*NAMED, *ALIASES, *OF_TOKENIZER)
    if not template.endswith(".jinja"):
        raise UserError(
            f"data.template={template!r} is not a known template{nearest(template, known)}; choose one of "
            f"{', '.join(NAMED)} (or its name in Axolotl or LLaMA-Factory), name a .jinja file, or set "
            "data.template=null for the tokenizer's own"
        )
    if not Path(template).expanduser().is_file():
        near = nearest(template.removesuffix(".jinja"), known)
        raise UserError(
            f"data.template={template} is not a file; name a .jinja file, or one of {', '.join(NAMED)}{near}"
        )
    return TemplateChoice(template)


def template_source(template: str | None) -> str | None:
    """Return the Jinja text of `data.template`, a part of the cache key; None: it means the tokenizer's own.

    Raises UserError as `template_choice`, and for a file that is not UTF-8.
    """
    replacement = template_choice(template).replacement
    if replacement is None:
        return None
    if replacement in NAMED:
        return (resources.files("distlora.data") / "chat_templates" / f"{replacement}.jinja").read_text("utf-8")
    try:
        return Path(replacement).expanduser().read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.template={template} is not UTF-8 ({error.reason}); save it as UTF-8") from error


def start_tokens(tokenizer: Any) -> list[int]:
    """[beginning of text] where the tokenizer itself puts that token in front of a text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


@functools.cache
def _uses_powers(source: str) -> bool:
    import jinja2

    return any(token[1:] == ("operator", "**") for token in jinja2.Environment().lex(source))


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Raise TimeoutError or MemoryError if rendering goes beyond its limits: in the main thread, where signals work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it is not done after {RENDER_SECONDS:g} s of CPU time")

    handler, (most, hard) = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        with open("/proc/self/statm") as pages:
            limit = int(pages.read().split()[0]) * resource.getpagesize() + int(RENDER_GIB * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(most, limit), hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_SECONDS, 1.0)  # Again, as Jinja's compiler drops exceptions.
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it needs more than {RENDER_GIB:g} GiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


class ChatTemplate:
    """A chat template with a tokenizer: messages to text.

    Raises UserError, when it is built, where there is no template, where it is not valid Jinja, and where a
    named one needs tokens that the tokenizer lacks.
    """

    def __init__(
        self, tokenizer: Any, model_path: str, template: str | None = None, *, source: str | None = None
    ) -> None:
        """`template` is data.template; `source` is the Jinja text that an earlier `ChatTemplate` had, used as it is."""
        choice = template_choice(template)
        is_own = choice.replacement is None or (choice.is_fallback and tokenizer.chat_template is not None)
        self.name = f"the chat template in {model_path}" if is_own else f"data.template={template}"
        if template is not None and template != choice.replacement:
            self.name += f" (data.template={template})" if is_own else f" ({choice.replacement})"
        self._tokenizer = tokenizer
        self._model_path = model_path
        self._special = tokenizer.special_tokens_map
        self.unwritten = (0, 0)
        """(messages, characters) of reasoning that the template did not write, as `TurnFinder` counted them."""
        self._no_tools: str | None = None
        """Why a named template cannot write tools; None where it can, and for every other template."""
        self.source: str | None = None
        """The Jinja text that replaces the tokenizer's own, as it must be used at inference too; None: its own."""
        if source is not None:
            self.source = source
        elif not is_own:
            self.source = template_source(template)
            assert self.source is not None
            if choice.replacement in NAMED:
                self.source = self._fitted(str(template), choice.replacement, self.source)
        elif tokenizer.chat_template is None:
            needed = "chats need" if template is None else f"data.template={template} means"
            raise UserError(
                f"the tokenizer in {model_path} has no chat template, which {needed}; set data.template to "
                f"{', '.join(self._usable()) or 'a .jinja file'}, use the model's instruct variant, or write the data "
                "as prompt/completion"
            )
        elif choice.marker not in self._text(None):
            raise UserError(
                f"data.template={template} means the chat template of a tokenizer of that family, and the one in "
                f"{model_path} never writes {choice.marker}; set data.template=null to use it all the same, or name "
                f"another one ({', '.join(self._usable())})"
            )
        self._takes_parts = False
        """True if the template writes contents as parts alone, as some processors of images do."""
        if "messages" in (source_text := self._text(None)) and "type" in source_text:
            self._takes_parts = self._loses_texts()
        self.prompt = self._generation_prompt()
        """The template's generation prompt; empty if unknown."""

    def is_marked(self, tools: Sequence[Any] | None = None) -> bool:
        """Return whether the template marks the assistant's parts. It may depend on tools."""
        return _GENERATION.search(self._text(tools)) is not None

    def reads(self, key: str) -> bool:
        """Return whether the template names a key of a message."""
        return re.search(rf"\b{re.escape(key)}\b", self._text(None) + self._text([{}])) is not None

    def render(
        self, place: str, messages: list[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False
    ) -> str:
        """Return a conversation as text; with `prompt`, up to where the assistant speaks. Refusals name `place`."""
        with self._refusals(place):
            return self._render(messages, tools, prompt=prompt, marks=False)[0]

    def render_marked(
        self, place: str, messages: list[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and where its {% generation %} parts lie in it, in characters."""
        with self._refusals(place):
            return self._render(messages, tools, prompt=False, marks=True)

    def check_tools(self, place: str, messages: list[Message], tools: Sequence[Any] | None) -> None:
        """Refuse tools that the template leaves out, knows none of, or writes with tokens that the tokenizer lacks."""
        calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if self._no_tools is not None and (tools or calls):
            raise UserError(f"{place}: {self.name} {self._no_tools}; leave this document out, or {TOOLS_ADVICE}")
        if not tools:
            return
        # Under other names, since an answer may hold a tool's own.
        marked = [tool | {"function": tool["function"] | {"name": tool["function"]["name"] + _MARK}} for tool in tools]
        text = self.render(place, messages, marked)
        for tool in tools:
            if (name := tool["function"]["name"]) + _MARK not in text:
                raise UserError(f"{place}: {self.name} leaves out the tool {name!r}; remove 'tools', or {TOOLS_ADVICE}")

    @contextlib.contextmanager
    def _refusals(self, place: str) -> Iterator[None]:
        """Name the document that the template refuses: raise_exception in it, or a field that it takes otherwise."""
        import jinja2

        try:
            yield
        except Exception as error:
            # What runs there is the template's own code, in a sandbox: an index, a division, a filter's argument.
            reason = f"fails at this conversation ({type(error).__name__}: {error})"
            if isinstance(error, jinja2.TemplateError):
                reason = f"refuses this conversation: {error}"
            raise UserError(
                f"{place}: {self.name} {reason}; correct the document, or choose another data.template"
            ) from error

    def _text(self, tools: Sequence[Any] | None) -> str:
        return self._tokenizer.get_chat_template(self.source, tools or None)

    def _render(
        self, messages: list[Message], tools: Sequence[Any] | None, *, prompt: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        # The function behind apply_chat_template, which gives the marks in tokens only, from tokens of its own.
        from transformers.utils.chat_template_utils import render_jinja_template

        # As apply_chat_template does: many templates write "None" for a key that is null, and skip an absent one.
        conversation = [
            {key: value for key, value in message.items() if value is not None and key not in MASK_KEYS}
            for message in messages
        ]
        if self._takes_parts or any(isinstance(message.get("content"), list) for message in conversation):
            conversation = [message | {"content": _as_parts(message.get("content"))} for message in conversation]
        source = self._text(tools)
        if _uses_powers(source):
            raise ValueError("it uses the operator **, whose numbers may grow without limit")
        with _limits():
            rendered: Any = render_jinja_template(
                conversations=[conversation],
                tools=list(tools) if tools else None,
                chat_template=source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._special,
            )
        texts, spans = rendered
        if len(texts[0]) > MOST_CHARACTERS:
            raise MemoryError(f"it writes {len(texts[0]):,} characters, and the limit is {MOST_CHARACTERS:,}")
        return texts[0], spans[0] if marks else []

    def _loses_texts(self) -> bool:
        """Return whether the template writes a text that is a part and not one that is a content."""
        question = "QUESTION"
        written = []
        for content in (question, [{"type": "text", "text": question}]):
            try:
                text = self._render([{"role": "user", "content": content}], None, prompt=False, marks=False)[0]
            except Exception:  # As in _generation_prompt.
                text = ""
            written.append(question in text)
        return written == [False, True]

    def _generation_prompt(self) -> str:
        """Compiles the template, and looks what it adds to a question. A template may refuse this very question."""
        import jinja2

        question = [{"role": "user", "content": "a"}]
        try:
            before, after = (self._render(question, None, prompt=prompt, marks=False)[0] for prompt in (False, True))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.name} is not valid: line {error.lineno}: {error.message}; correct it") from error
        except Exception:
            # As in _refusals. A template that refuses every conversation is named at the first one.
            return ""
        return after[len(before) :] if after.startswith(before) else ""

    def token_ids(self, eot_tokens: Sequence[str]) -> list[int]:
        """Return the ids of data.eot_tokens. Raises UserError for one that is no single token or that is not written.

        The end-of-text token may be in the template by its name alone.
        """
        ids = []
        for token in eot_tokens:
            if not self._is_one_token(token):
                raise UserError(
                    f"data.eot_tokens: {token} is not one token of the tokenizer in {self._model_path}; correct it, or "
                    f"add it with 'model.new_tokens=[\"{token}\"]'"
                )
            is_named = token == self._tokenizer.eos_token and "eos_token" in self._text(None)
            if token not in self._text(None) and not is_named:
                ends = [self._tokenizer.convert_ids_to_tokens(id) for id in self.end_of_turn()]
                raise UserError(
                    f"data.eot_tokens: {self.name} never writes {token}"
                    + (f", and ends a turn with {ends[0]}" if ends else "")
                    + "; leave it out, or choose another data.template"
                )
            ids.append(self._tokenizer.convert_tokens_to_ids(token))
        return ids

    def end_of_turn(self) -> list[int]:
        """Return [the first added token that the template writes behind a final answer], or [] without one."""
        answer = "ANSWER"
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
        try:
            text = self.render("the turn that tells what ends an answer", turns)
        except UserError:
            # A template that refuses every conversation is named at the first one.
            return []
        behind = text.rpartition(answer)[2] if answer in text else ""
        ids = self._tokenizer(behind, add_special_tokens=False, verbose=False).input_ids
        return [token for token in ids if token in self._tokenizer.added_tokens_decoder][:1]

    def _fitted(self, template: str, name: str, source: str) -> str:
        """Return the text of the template `name` for this tokenizer. Raises UserError where it lacks its tokens."""
        if missing := self._missing(name):
            tokens = ",".join(f'"{token}"' for token in NAMED[name].split() if token in missing)
            add = f", or add them with 'model.new_tokens=[{tokens}]'" if tokens else ""
            raise UserError(
                f"data.template={template} needs {', '.join(missing)}, which the tokenizer in {self._model_path} "
                f"lacks; set data.template to {', '.join(self._usable() or ['a .jinja file'])} or null{add}"
            )
        if name not in TOOL_MARKERS:
            self._no_tools = "knows no tools"
        elif lacking := self._not_one_token(TOOL_MARKERS[name]):
            lacks = f"{', '.join(lacking)}, which the tokenizer in {self._model_path} lacks"
            self._no_tools = f"writes tools with {lacks}"
        return source if start_tokens(self._tokenizer) else source.replace(_BOS_LINE, "", 1)

    def _usable(self) -> list[str]:
        """Return the named templates whose tokens the tokenizer has."""
        return [name for name in NAMED if not self._missing(name)]

    def _missing(self, name: str) -> list[str]:
        """Return what a named template needs and the tokenizer lacks: markers, and special tokens that it names."""
        source = str(template_source(name)).replace(_BOS_LINE, "", 1)
        names = {"bos_token": "a beginning-of-text token", "eos_token": "an end-of-text token"}
        return self._not_one_token(NAMED[name]) + [
            words for key, words in names.items() if key in source and getattr(self._tokenizer, key) is None
        ]

    def _not_one_token(self, markers: str) -> list[str]:
        return [token for token in markers.split() if not self._is_one_token(token)]

    def _is_one_token(self, token: str) -> bool:
        ids = self._tokenizer(token, add_special_tokens=False).input_ids
        return len(ids) == 1 and self._tokenizer.convert_ids_to_tokens(ids[0]) == token


def _as_parts(content: Any) -> Any:
    """Return a content as parts; templates see of an image that there is one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": "image"} if part["type"] == "image" else part for part in content or ()]
