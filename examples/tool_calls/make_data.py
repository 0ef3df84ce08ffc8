"""Write tool_chats.jsonl, chats in which an assistant calls one of two tools and answers with the result.

Write ask.jsonl too: two questions with the same tools, for the trained model.
"""

import json
import random
from pathlib import Path

draw = random.Random(0)
CITIES = ["Paris", "Oslo", "Cairo", "Lima", "Tokyo", "Delhi", "Berlin", "Madrid", "Quito", "Kyiv"]
NUMBER = {"type": "number"}


def tool(name: str, description: str, **arguments: dict[str, str]) -> dict[str, object]:
    """Return the schema of a tool whose arguments are all required."""
    parameters = {"type": "object", "properties": arguments, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool("weather", "The temperature of a city", city={"type": "string"}),
    tool("multiply", "The product of two numbers", a=NUMBER, b=NUMBER),
]

chats = []
for number in range(80):
    if number % 2:
        city, degrees = draw.choice(CITIES), draw.randrange(-10, 35)
        question, call = f"How warm is it in {city}?", {"name": "weather", "arguments": {"city": city}}
        result, answer = {"celsius": degrees}, f"It is {degrees} degrees in {city}."
    else:
        a, b = draw.randrange(11, 100), draw.randrange(11, 100)
        question, call = f"What is {a} times {b}?", {"name": "multiply", "arguments": {"a": a, "b": b}}
        result, answer = {"product": a * b}, f"{a} times {b} is {a * b}."
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": call["name"], "content": json.dumps(result)},
        {"role": "assistant", "content": answer},
    ]
    chats.append(messages)

asked = [[{"role": "user", "content": text}] for text in ("What is 35 times 12?", "How warm is it in Rome?")]
for name, records in (("tool_chats.jsonl", chats), ("ask.jsonl", asked)):
    lines = [json.dumps({"messages": messages, "tools": TOOLS}) + "\n" for messages in records]
    Path(name).write_text("".join(lines))
