"""The progress line is redrawn on a real terminal and stays out of the way in a log."""

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest

from pretrain.metrics.progress import Progress, format_duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def update(progress, step, *, loss=2.3456):
    progress.update(
        step=step, loss=loss, learning_rate=1.5e-4, images_per_second=1234.5, data_wait_fraction=0.031
    )


def test_in_a_log_there_is_a_plain_line_at_first_then_every_n_seconds_then_at_the_last_step():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(total_steps=100, stream=stream, every_seconds=10, clock=clock)
    for step in range(1, 101):
        update(progress, step)
        clock.now += 1.0
    progress.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert [int(re.search(r"step +(\d+)/100", line)[1]) for line in lines] == [*range(1, 101, 10), 100]
    assert lines[1] == ("step  11/100  loss 2.3456  lr 1.50e-04  1,234 images/s  data wait 3%  ETA 1m29s")


def test_the_eta_counts_what_happens_between_steps_too():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(total_steps=10, stream=stream, every_seconds=0, clock=clock)
    update(progress, 1)
    assert stream.getvalue().endswith("ETA ?\n")
    clock.now += 2 * 30.0  # two steps in a minute, a slow checkpoint among them
    update(progress, 3)
    assert stream.getvalue().endswith("ETA 3m30s\n")
    update(progress, 10)
    assert stream.getvalue().endswith("ETA 0s\n")


@pytest.fixture
def terminal():
    """A terminal 60 columns wide: the file to write to, and a function that reads what arrived."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with os.fdopen(slave, "w") as stream:

        def written() -> str:
            stream.write("<end>")  # a terminal hands bytes over in pieces
            stream.flush()
            text = b""
            while not text.endswith(b"<end>"):
                text += os.read(master, 1 << 16)
            return text.decode().removesuffix("<end>")

        yield stream, written
    os.close(master)


def test_on_a_terminal_one_line_is_drawn_over_again_and_notes_stay_above_it(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream, written = terminal
    clock = Clock()
    progress = Progress(total_steps=1000, stream=stream, clock=clock)
    for step in range(1, 6):
        update(progress, step)
        clock.now += 1.0
    progress.note("checkpoint written")
    update(progress, 6)
    progress.close()
    text = written()
    assert text.count("\n") == 2  # after the note, and at the end
    shown = [part.split("\r\x1b[K")[-1].strip("\r") for part in text.split("\n")]
    assert shown[0] == "checkpoint written"
    assert shown[1].startswith("step    6/1000  loss 2.3456")
    assert all(len(part) < 60 for part in re.split("\r\x1b\\[K|\r?\n", text))


def test_on_a_terminal_fast_steps_do_not_flood_it(terminal):
    stream, written = terminal
    clock = Clock()
    progress = Progress(total_steps=10_000, stream=stream, clock=clock)
    for step in range(1, 1001):
        update(progress, step)
        clock.now += 0.001
    assert 5 <= written().count("\r\x1b[K") <= 12


def test_a_loss_that_is_not_a_number_is_shown_as_such():
    stream = io.StringIO()
    update(Progress(total_steps=2, stream=stream), 1, loss=float("nan"))
    assert "loss nan" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3661, "1h01m"), (90000, "1d01h")],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text
