"""Output of the launcher, and of rank 0, which is shown as it comes and copied into its log."""

import codecs
import errno
import fcntl
import os
import pty
import select
import shutil
import sys
import termios
from pathlib import Path
from typing import TextIO

from distlora.config.base import is_hub_name


class Output:
    """Our end of rank 0's stdout, which rank 0 opens by `path`: a terminal like ours, else a pipe in `folder`."""

    def __init__(self, log: Path, folder: Path) -> None:
        self._log = log
        self._log_failed = False
        self._ours, self._theirs, self.path = open_output(folder)
        self._size = shutil.get_terminal_size()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # A chunk may end within a character.
        sys.stdout.flush()

    def pump(self, seconds: float) -> bool:
        """Show what there is, after waiting at most `seconds` for it; False when nothing came."""
        if shutil.get_terminal_size() != self._size:
            self._size = shutil.get_terminal_size()
            copy_size(self._ours)
        readable, _, _ = select.select([self._ours], [], [], seconds)
        if not readable:
            return False
        chunk = os.read(self._ours, 65536)
        # By its name each time: the log of a rank that is started again moves out of the way.
        try:
            with self._log.open("ab", buffering=0) as file:
                file.write(chunk)
        except OSError as error:  # A full disk: the run itself goes on.
            if not self._log_failed:
                warn(f"{self._log} cannot be written ({error.strerror}): rank 0 is only shown here")
            self._log_failed = True
        show(self._decoder.decode(chunk))
        return True

    def drain(self) -> None:
        """Show all that there is."""
        while self.pump(0.0):
            pass

    def close(self) -> None:
        """Close our end."""
        os.close(self._ours)
        os.close(self._theirs)


def open_output(folder: Path) -> tuple[int, int, str]:
    """Return (our end, the other end, its path) of rank 0's stdout. The other end stays open while workers restart."""
    if not sys.stdout.isatty():
        path = folder / "stdout"
        os.mkfifo(path, 0o600)
        ours = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        return ours, os.open(path, os.O_WRONLY), str(path)
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # Our own terminal turns \n into \r\n already.
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    copy_size(ours)
    return ours, theirs, os.ttyname(theirs)


def copy_size(terminal: int) -> None:
    """Give a pseudo-terminal the size of the one we write to."""
    if os.isatty(terminal) and sys.stdout.isatty():
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def show(text: str) -> None:
    """Write to stdout; ignore a reader that has left.

    The run goes on after `... | head`, a closed pager or terminal: its output is in its logs.
    """
    _write(sys.stdout, text)


def say(text: str) -> None:
    """Print a line on stdout."""
    show(text + "\n")


def warn(text: str) -> None:
    """Print a line on stderr, whether or not it is still read."""
    _write(sys.stderr, text + "\n")


def shown(path: Path) -> str:
    """Return a path as the user would type it: relative where it lies under the working folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def name_of(place: str) -> str:
    """Return the name in a report: that of the folder or file, with its parent where it is `model`."""
    if is_hub_name(place):
        return place
    path = Path(place)
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
