"""Exit codes of every command, and refusals: an error that a user can fix is one line on stderr, never a traceback.

Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped after a save (EX_TEMPFAIL: try again), 128 + n ended by signal n.
Imports no torch.
"""

import errno
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Mapping

from distlora.config import UserError
from distlora.config.errors import in_one_line

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
INTERRUPTED = 128 + signal.SIGINT

_BAD_PATH = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    errno.EROFS,
)
"""Errors of the system for a mistyped path, rather than for a failing disk."""


def run_to_exit_code(
    work: Callable[[], int], *, full_disk: str = "free some space", names: Mapping[str, str] | None = None
) -> int:
    """Do `work`, print errors in one line and return the exit code.

    2 after a UserError or for a path that the system refuses, 1 for another fault of the system and for a reader that
    left (`... | head`), 130 after Ctrl-C. `full_disk` is what to do when the disk is full; `names` has the command's
    argument for each setting that a UserError may name. Any other exception is a bug and is raised.
    """
    try:
        code = work()
        sys.stdout.flush()  # Here, where a reader that left is noticed, and not when Python ends.
        return code
    except UserError as error:
        print(f"error: {error.named(names or {})}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more, which is no error of ours; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.errno == errno.ENOSPC:
            place = f"{error.filename}: " if error.filename else ""
            print(in_one_line(f"error: {place}{error.strerror}; {full_disk}"), file=sys.stderr)
            return FAILED
        if error.filename is None or error.strerror is None:
            raise
        advice = "name another path" if error.errno in _BAD_PATH else "look after that disk, and start again"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "name a place that you may read and write, or change its permissions"
        print(in_one_line(f"error: {error.filename}: {error.strerror}; {advice}"), file=sys.stderr)
        return BAD_INPUT if error.errno in _BAD_PATH else FAILED


EXTRAS = {
    "gguf": "gguf",
    "lm_eval": "eval",
    "peft": "demo",
    "bitsandbytes": "bnb",
    "accelerate": "bnb",
    "math_verify": "rl",
    "jsonschema": "rl",
    "PIL": "vision",
    "torchvision": "vision",
    "causal_conv1d": "hybrid",
    "mamba_ssm": "hybrid",
    "fla": "hybrid",
    **{name: name for name in ("tensorboard", "mlflow", "trackio", "swanlab")},
}
"""Optional package, as it is imported, to the extra of distlora that installs it."""


def require_package(package: str, argument: str, *, otherwise: str = "") -> None:
    """Raise UserError if a package that `argument` needs is missing. `otherwise` is another cure, such as a flag."""
    if importlib.util.find_spec(package) is None:
        extra = EXTRAS.get(package)
        install = f"'distlora[{extra}]'" if extra else package.replace("_", "-")
        raise UserError(f"{argument} needs {package}, which is not installed; `pip install {install}`{otherwise}")
