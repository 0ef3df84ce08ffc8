"""Write 120 questions, one per line."""

import json

THINGS = ["a river", "a bridge", "the moon", "bread", "a clock", "snow"]
THINGS += ["a library", "music", "a garden", "the wind", "a ship", "tea"]
FORMS = ["What is {}?", "Tell me about {}.", "Why do people like {}?", "Describe {}.", "Where would I find {}?"]
FORMS += [f"{form} I am a child." for form in FORMS]

for form in FORMS:
    for thing in THINGS:
        print(json.dumps({"prompt": [{"role": "user", "content": form.format(thing)}]}))
