"""Run the tests of an answer inside the sandbox: `python -I -c THIS_FILE`.

Prints the content of the file `word`, which it removes first, once the answer's module and the tests' have run to their
ends, and every test function and unittest.TestCase of the tests has passed. A program that leaves before, with whatever
exit code, has not passed.
"""

import os
import sys
import unittest


def main() -> None:
    """Import both modules from the working folder, and run the tests."""
    with open("word") as file:  # No argument: an answer could read it.
        word = file.read()
    os.unlink("word")
    report = os.dup(1)
    silence = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    os.dup2(silence.fileno(), 1)
    os.dup2(silence.fileno(), 2)
    sys.path.insert(0, os.getcwd())
    import tests

    for name, test in vars(tests).items():
        if name.startswith("test") and getattr(test, "__module__", None) == "tests" and not isinstance(test, type):
            test()
    suite = unittest.defaultTestLoader.loadTestsFromModule(tests)
    if unittest.TextTestRunner(stream=silence).run(suite).wasSuccessful():
        os.write(report, word.encode())


if __name__ == "__main__":
    main()
