"""Dialogues of a rollout: the model and an environment speak in turn, and all dialogues go on together.

No token that the model wrote is tokenized again: what the chat template writes between two turns of the model is
tokenized alone and appended. Letters: N dialogues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distlora.config import UserError
from distlora.data.chat_template import Message
from distlora.data.turn_writer import TurnWriter, call_id
from distlora.generation.sampling import Request, Sample
from distlora.parallel.ranks import Ranks
from distlora.rewards.pool import REASONS, RewardInput, RewardPool

_FAULT = [-1]
"""Stands for the tokens of an environment that failed."""


@dataclass(slots=True, eq=False)
class Dialogue:
    """An answer in turns, from the prompt on."""

    messages: list[Message] = field(default_factory=list)
    """Messages of the assistant and of the environment, on the rank whose environment it is. The last one of the
    environment may not have fitted in."""
    tokens: list[int] = field(default_factory=list)
    """Tokens behind the prompt."""
    written: list[int] = field(default_factory=list)
    """1 for each token that the model wrote, 0 for the environment's."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token, 0 for the environment's."""
    ended: bool = False
    """True if the environment ended it; without one, if the model did."""
    failed: bool = False
    """True if the environment failed."""

    @property
    def last_turn(self) -> list[int]:
        """Tokens of the model's last turn."""
        start = len(self.written)
        while start and self.written[start - 1]:
            start -= 1
        return self.tokens[start:]

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Append tokens of the model with their log-probabilities, or tokens of the environment."""
        self.tokens += tokens
        self.written += [int(logprobs is not None)] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class DialogueSampler:
    """Sample answers, which are dialogues where there is an environment. Every rank calls it alike."""

    tokenizer: Any
    stops: Sequence[int]
    """Tokens that end a turn."""
    pool: RewardPool
    ranks: Ranks
    gather: Callable[[dict[int, Sample], int], list[Sample]]
    """Return the samples of all ranks, in order."""
    writer: TurnWriter | None
    """None: an answer is one message."""
    max_turns: int

    def run(
        self,
        requests: Sequence[Request],
        inputs: Callable[[int, Dialogue], RewardInput],
        sample: Callable[[Sequence[Request]], list[Sample]],
        mark: Callable[[str], None],
    ) -> tuple[list[Dialogue], dict[str, int]]:
        """Return the dialogues that begin with the prompts of requests (N,), and this rank's counts by metric.

        `inputs(index, dialogue)`: what the environment gets. `sample`: the engine. `mark(phase)` is called before
        environments speak: a rank's are those of its part of the N dialogues, which alone have their messages.
        """
        dialogues, mine = [Dialogue() for _ in requests], self.ranks.part_of(len(requests))
        counts = dict.fromkeys(self._metrics, 0)
        going, turn = list(range(len(requests))), 0
        while going:
            samples, turn = sample([_continued(requests[index], dialogues[index]) for index in going]), turn + 1
            for index, answer in zip(going, samples, strict=True):
                dialogues[index].add(answer.tokens, answer.logprobs)
                dialogues[index].ended = answer.ended
                if index in mine:
                    text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
                    dialogues[index].messages.append({"role": "assistant", "content": text})
            going = [index for index in going if dialogues[index].ended] if self.writer is not None else []
            if not going:
                break
            mark("waiting for environments")
            owned = [index for index in going if index in mine]
            spoken = self._spoken([(dialogues[index], inputs(index, dialogues[index])) for index in owned], counts)
            first = len([index for index in going if index < mine.start])
            tokens = {
                first + place: self._tokens(requests[index], dialogues[index], messages, counts)
                for place, (index, messages) in enumerate(zip(owned, spoken, strict=True))
            }
            for index, reply in zip(going, self.gather(tokens, len(going)), strict=True):
                dialogue = dialogues[index]
                dialogue.ended = reply.ended
                dialogue.failed = reply.tokens == _FAULT
                if not dialogue.failed and turn < self.max_turns:
                    dialogue.add(reply.tokens)
            going = [index for index in going if turn < self.max_turns and not dialogues[index].written[-1]]
        return dialogues, counts

    def text(self, dialogue: Dialogue) -> str:
        """Return an answer as a person reads it: with the template's tokens where they show who speaks."""
        return str(self.tokenizer.decode(dialogue.tokens, skip_special_tokens=all(dialogue.written)))

    @property
    def _metrics(self) -> list[str]:
        """Counts of faults by reason, and of calls."""
        if self.writer is None:
            return []
        has_tools = self.writer.calls is not None
        names = ("calls", *REASONS) if has_tools else REASONS
        return [f"{'tools' if has_tools else 'environment'}/{name}" for name in names]

    def _spoken(
        self, dialogues: Sequence[tuple[Dialogue, RewardInput]], counts: dict[str, int]
    ) -> list[list[Message] | None]:
        """Return what environments or tools say in dialogues: messages, none where one ends, and None for a fault."""
        assert self.writer is not None
        if self.writer.calls is None:
            replies = self.pool.converse([given for _, given in dialogues])
            for reason in (next(iter(reply)) for reply in replies if "value" not in reply):
                counts[f"environment/{reason}"] += 1
            return [reply.get("value") for reply in replies]
        texts = [
            self.tokenizer.decode(dialogue.last_turn, clean_up_tokenization_spaces=False) for dialogue, _ in dialogues
        ]
        calls = [self.writer.calls.read(text) for text in texts]
        made = [(call.name, call.arguments) for each in calls for call in each if call.error is None]
        results = iter(self.pool.call(made))
        spoken: list[list[Message] | None] = []
        for (dialogue, _), each in zip(dialogues, calls, strict=True):
            if each:
                dialogue.messages[-1]["tool_calls"] = [call.message(number) for number, call in enumerate(each)]
            messages = []
            for number, call in enumerate(each):
                [(reason, text)] = ({"invalid": call.error} if call.error else next(results)).items()
                counts["tools/calls"] += 1
                if reason != "value":
                    metric = f"tools/{reason}"
                    counts[metric] += 1
                    function = "a call of a tool:" if call.error else f"the tool {call.name}"
                    self.pool.log_once(function, metric, text, "the model reads this error")
                    text = f"error: {text.partition(chr(10))[0]}"
                messages.append({"role": "tool", "name": call.name, "tool_call_id": call_id(number), "content": text})
            spoken.append(messages)
        return spoken

    def _tokens(
        self, request: Request, dialogue: Dialogue, spoken: list[Message] | None, counts: dict[str, int]
    ) -> Sample:
        """Return messages as tokens up to the next turn, none if that has no room then; `ended` without messages."""
        assert self.writer is not None
        tokens = _FAULT if spoken is None else list[int]()
        if spoken:
            try:
                tokens = self.writer.tokens(spoken, dialogue.tokens[-1], self.stops)
            except UserError as error:  # A role that the template refuses there. The other ranks wait for this one.
                metric = "tools/invalid" if self.writer.calls else "environment/invalid"
                self.pool.leave_out("a reply", metric, str(error), "its dialogue")
                counts[metric] += 1
                return Sample(_FAULT, [0.0], False)
            dialogue.messages += spoken
            if len(dialogue.tokens) + len(tokens) >= request.max_new_tokens:
                tokens = []
        return Sample(tokens, [0.0] * len(tokens), spoken == [])


def _continued(request: Request, dialogue: Dialogue) -> Request:
    """Return the request for the next turn of a dialogue."""
    left = request.max_new_tokens - len(dialogue.tokens)
    return replace(request, tokens=request.tokens + dialogue.tokens, max_new_tokens=left)
