"""For tests of running processes: events are waited for, times never."""

import time

# Seconds after which a thing that must happen counts as not happening. The daemon's own patience with a GPU is below this.
PATIENCE = 60


def text_of(path):
    """What a file holds; nothing, if it is not there (yet)."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


def wait_for(condition, what, failed=None, timeout=PATIENCE):
    """Looks again and again until `condition` holds, and returns its answer. `failed` returns a reason to give up at once."""
    end = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        why = failed() if failed else None
        if why:
            raise AssertionError(f"{what}: {why}")
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout} s")
        time.sleep(0.002)
