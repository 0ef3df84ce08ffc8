"""Write chats.jsonl, 24 chats that show how the tool is called, and questions.jsonl, 96 questions about other items."""

import json
from pathlib import Path

from shop import PRICES, price

FORMS = ["How much is a {}?", "What does a {} cost?", "I would like a {}. What is the price?"]
FORMS += ["Tell me the price of a {}.", "Do you have a {}? What does it cost?", "What would I pay for a {}?"]
ITEM = {"type": "string", "description": "One item, in one word."}
PARAMETERS = {"type": "object", "properties": {"item": ITEM}, "required": ["item"]}
TOOL = {"name": "price", "description": "Look up the price of an item of the shop.", "parameters": PARAMETERS}


def chat(question, item):
    """Return a question, the call, the tool's result and the answer."""
    call = {"type": "function", "function": {"name": "price", "arguments": {"item": item}}}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "price", "content": price(item)},
        {"role": "assistant", "content": f"It costs {PRICES[item]} dollars."},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": TOOL}]}


pairs = [(form.format(item), item) for item in PRICES for form in FORMS]
chats = [chat(*pair) for pair in pairs[:24]]
questions = [{"prompt": [{"role": "user", "content": text}], "item": item} for text, item in pairs[24:]]
Path("chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
Path("questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in questions))
