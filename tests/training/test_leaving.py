"""The end of a process."""

import subprocess
import sys

ENDS = """
import os, sys
from inpo_fast.training.leaving import leave

class Tells:
    def __del__(self, write=os.write):
        write(1, b"the interpreter went down")

kept = Tells()
print("said")
print("warned", file=sys.stderr)
leave()
"""


def test_leaving_writes_what_was_said_and_takes_no_interpreter_down():
    # a pipe, so that what is said waits in a buffer
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "said\n", "warned\n")
    assert (
        "went down"
        in subprocess.run(
            [sys.executable, "-c", ENDS.replace("leave()", "")], capture_output=True, text=True
        ).stdout
    )
