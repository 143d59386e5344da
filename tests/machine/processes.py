"""Processes that start children, and are killed."""

import subprocess
import sys
import time

import psutil

PATIENCE = 60.0


def child_ends_with_parent(program, pid_file):
    """Whether a child that a program starts, and that writes its id to a file, ends when the program is killed."""
    parent = subprocess.Popen([sys.executable, "-c", program])
    assert soon(lambda: pid_file.is_file() and pid_file.read_text()), "the child has not begun"
    child = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    return soon(lambda: not is_alive(child))


def soon(happens):
    """Whether something happens before long."""
    deadline = time.monotonic() + PATIENCE
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(happens())


def is_alive(pid):
    """Whether a process is running."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
