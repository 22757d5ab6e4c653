"""Signals to real processes: they end a command even in the middle of foreign code; a closed pipe does so quietly."""

import signal
import subprocess
import sys
import time

import pytest

# Foreign code that knows nothing of Python: it waits, and waits again, whatever signal comes.
DEAF = """
import ctypes, sys
from pipelines.cli import stopping
stopping.GRACE = float(sys.argv[1])
stopping.watch_signals()
foreign = ctypes.CDLL(None)
mask = (ctypes.c_ulong * 16)()
mask[0] = (1 << 1) | (1 << 14)  # SIGINT and SIGTERM go to the other threads, so that nothing interrupts this one
foreign.pthread_sigmask(0, mask, None)
said = False
while True:
    try:
        if not said:
            said = True
            print("ready", flush=True)
        foreign.sleep(60)
    except KeyboardInterrupt:  # the signal was quicker than this line
        pass
"""


def start(code, *arguments, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def outcome(process):
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout + stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_foreign_code_that_does_not_return_is_cut_off(number, code):
    process = start(DEAF, 0.3)
    process.send_signal(number)
    assert outcome(process) == (code, "stopped\n")


def test_a_second_signal_ends_at_once():
    process = start(DEAF, 50)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < 40:
        time.sleep(0.3)  # another Ctrl-C, not the same one passed on twice
        process.send_signal(signal.SIGINT)
    assert outcome(process) == (130, "")


COMMAND = """
import time
from pipelines.cli import app, main
@app.app.command("wait")
def wait():
    print("ready", flush=True)
    time.sleep(60)
main.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_ends_in_one_line_with_the_code_of_a_shell(number, code):
    process = start(
        COMMAND, "wait", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )  # under nohup it is ignored
    process.send_signal(number)
    assert outcome(process) == (code, "stopped\n")


def test_a_signal_that_nohup_ignores_stays_ignored():
    process = start(COMMAND, "wait", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert outcome(process)[0] == 143


def test_a_reader_that_goes_away_is_no_error():
    glad = [sys.executable, "-m", "pipelines.cli", "config", "show"]
    process = subprocess.Popen(glad, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
