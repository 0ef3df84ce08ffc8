"""A process of its own (`python -m distlora_launcher.demo.answers RUN QUESTIONS FILE`): answers before and after a run.

transformers and PEFT answer, on the 4-bit base in fp32, without and with the adapter. distlora's own model then reads
the answers: they are its greedy ones if each token is the one that it finds most likely there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from distlora.data.prompts import Prompt
from distlora.generation.prompts import PromptEncoder
from distlora.parallel import Ranks
from distlora.post.export.client_check import dense_model
from distlora.post.load_trained import load_in_fp32
from distlora.post.trained import Name
from distlora.run_folder.layout import DATA_NAME, read_record
from distlora.system.import_peft import import_peft

LONGEST_ANSWER = 32
"""Tokens."""


@torch.no_grad()
def main(run: str, questions: str, file: str) -> None:
    """Write [{"question", "before", "after", "same"}, ...] to a file, for a JSON list of questions.

    "same" tells whether distlora answers as "after".
    """
    trained = Name(place=run).read()
    assert trained.weights is not None
    model, _ = load_in_fp32(trained, Ranks(0, 1, torch.device("cpu"), None))
    encoder = PromptEncoder(model, trained.spec.model, read_record(Path(run) / DATA_NAME))
    peft: Any = import_peft().PeftModel.from_pretrained(dense_model(trained), trained.weights)
    peft.eval()
    records = []
    for question in json.loads(questions):
        prompt = torch.tensor([encoder.encode(Prompt(place="the question", text=question))])
        with peft.disable_adapter():
            before = peft.generate(input_ids=prompt, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        after = peft.generate(input_ids=prompt, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        likeliest = model.logits(after)[:, prompt.shape[1] - 1 : -1].argmax(-1)
        texts = [
            encoder.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
            for tokens in (before, after)
        ]
        same = torch.equal(likeliest, after[:, prompt.shape[1] :])
        records.append({"question": question, "before": texts[0], "after": texts[1], "same": same})
    Path(file).write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
