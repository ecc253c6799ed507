"""What holds for every test process."""

from __future__ import annotations

import signal

# A shell that starts the suite in the background has it ignore SIGINT, and every child would inherit that:
# tests that interrupt a command need a process that can be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
