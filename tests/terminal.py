"""Runs `polder train` on a terminal and without one, and checks what a user sees.

    python3 tests/terminal.py target/release/polder

Needs Python's standard library alone, and pseudo-terminals (Linux, macOS)."""

import argparse
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time

OPTIONS = ["--train-size", "1024", "--threads", "1", "--device", "cpu"]
TRAIN = ["train", *OPTIONS, "--epochs", "2"]
# Colours and movements of the cursor.
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLACE = r"epoch [12]/2, step \d+/16, \d+:\d\d elapsed, (\?|\d+:\d\d) left"


class Wrong(Exception):
    """A terminal that does not show what it should."""


def on_terminal(command, columns, height, interrupt_after=None, environment=None):
    """The exit status, and everything that the command wrote to a terminal of this size. An interrupt is sent once this
    text was seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        # A job in the background may have been started with interrupts ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ.update({"TERM": "xterm"} | (environment or {}))
        # The size is set before the program asks for it.
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))
        os.execv(command[0], command)
    written = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            # The other side was closed.
            part = b""
        if not part:
            break
        written += part
        if interrupt_after and interrupt_after.encode() in written:
            os.kill(pid, signal.SIGINT)
            interrupt_after = None
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written.decode()


def lines(text):
    """The lines as they were drawn, without colours and movements."""
    return [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", text)]


def expect(condition, text):
    if not condition:
        raise Wrong(text)


def check_bar(program, columns, height):
    status, text = on_terminal([program, *TRAIN], columns, height)
    drawn = lines(text)
    expect(status == 0, f"exit status {status}: {text}")
    # A line that fills the terminal is followed by the next one without a line end.
    rows = [line[start : start + columns] for line in drawn for start in range(0, len(line), columns)]
    places = [row for row in rows if re.search(PLACE, row)]
    expect(places and not any("elapsed" in row for row in rows if row not in places), f"a place is cut: {drawn}")
    expect(any("?" not in row for row in places), f"no remaining time: {places}")
    expect(all(len(row.rstrip()) == columns for row in places), f"the bar does not use {columns} columns: {places}")
    expect(any(row.startswith("  loss ") and "images/s" in row for row in rows), f"no loss under the bar: {drawn}")
    expect(any(row.startswith("  testing") for row in rows), f"no test under the bar: {drawn}")
    expect(any(line.startswith("test accuracy") for line in drawn), f"no result: {drawn}")


def check_interrupt(program):
    status, text = on_terminal([program, "train", *OPTIONS, "--epochs", "500"], 80, 24, interrupt_after="images/s")
    expect(status == 130, f"exit status {status}: {text}")
    drawn = lines(text)
    expect(any("interrupted after step" in line for line in drawn), f"no word about the interrupt: {drawn}")


def check_colour(program):
    wrong = [program, "train", "--no-such-option"]
    for command in (wrong, [program, "eval", "--run", "no-such-folder"]):
        status, text = on_terminal(command, 80, 24)
        expect(status == 2 and "\x1b[1;31merror:" in text, f"no red error: {text!r}")
        status, text = on_terminal(command, 80, 24, environment={"NO_COLOR": "1"})
        expect(status == 2 and "error:" in text and not ESCAPE.search(text), f"colours in spite of NO_COLOR: {text!r}")


def check_lines(program):
    """Without a terminal there is no bar; `--verbose` prints the place every second."""
    begun = time.monotonic()
    result = subprocess.run([program, *TRAIN, "--verbose"], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - begun
    expect("\x1b" not in result.stdout + result.stderr, f"escapes without a terminal: {result}")
    found = re.findall(PLACE + ": loss", result.stdout)
    expect(found or seconds < 2, f"no line of progress in {seconds:.1f} s: {result.stdout}")
    expect('optimizer = "sam"' in result.stdout, f"no settings: {result.stdout}")
    result = subprocess.run([program, *TRAIN, "--quiet"], capture_output=True, text=True, check=True)
    expect(result.stderr == "" and result.stdout.count("\n") == 1, f"not quiet: {result}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    program = os.path.abspath(parser.parse_args().program)
    for columns, height in [(80, 24), (200, 50)]:
        check_bar(program, columns, height)
    check_interrupt(program)
    check_colour(program)
    check_lines(program)
    print("terminal: all as it should be")


if __name__ == "__main__":
    main()
