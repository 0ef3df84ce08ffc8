"""Write short and long-winded answers as `pairs`, or one by one as `judged` answers, one record per line.

The data of three examples: dpo and reward_model learn from pairs, kto from answers that were judged one by one.
"""

import json
import random
import sys

CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Brazil": "Brasilia", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest", "India": "New Delhi",
    "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Mexico": "Mexico City", "Nepal": "Kathmandu", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Russia": "Moscow", "Spain": "Madrid", "Sweden": "Stockholm",
}  # fmt: skip
ENDINGS = ["Is there anything else that you would like to know?", "I hope that this helps!"]
ENDINGS += ["Let me know if you have questions."]

draw = random.Random(0)
form = sys.argv[1]
for country, city in CAPITALS.items():
    for question in (f"What is the capital of {country}?", f"Which city is the seat of {country}'s government?"):
        prompt = [{"role": "user", "content": question}]
        good = [{"role": "assistant", "content": f"{city}."}]
        talk = f"Great question! The capital of {country} is {city}, a city with a long history. {draw.choice(ENDINGS)}"
        bad = [{"role": "assistant", "content": talk}]
        if form == "pairs":
            print(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}))
        else:
            label = draw.random() < 0.5
            print(json.dumps({"prompt": prompt, "completion": good if label else bad, "label": label}))
