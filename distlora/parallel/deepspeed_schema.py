"""Check a section zero_optimization by DeepSpeed's own schema: `python -m distlora.parallel.deepspeed_schema JSON`.

The launcher runs it in a process of its own: importing DeepSpeed takes seconds and binds the process to a device. The
last line on stdout is the first fault as a string in JSON, empty if there is none.
"""

import json
import sys
from typing import Any

from distlora.config import nearest
from distlora.config.deepspeed_file import ZERO
from distlora.config.errors import short


def schema_error(section: dict[str, Any]) -> str:
    """Return the first fault of a section in words; empty if there is none."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        fields = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
        hint = nearest(key, fields) if fault["type"] == "extra_forbidden" else ""
        return f"{ZERO}.{key}={short(fault['input'])}: {fault['msg']}{hint}"
    return ""


if __name__ == "__main__":
    print(json.dumps(schema_error(json.loads(sys.argv[1]))))
