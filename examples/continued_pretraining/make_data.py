"""Write the pages of this project's documentation as texts, one section per line."""

import json
import re
from pathlib import Path

docs = Path(__file__).parents[2] / "docs"
for page in sorted(docs.glob("*.md")):
    for section in re.split(r"\n(?=## )", page.read_text(encoding="utf-8")):
        print(json.dumps({"text": section.strip()}))
