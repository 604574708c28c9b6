import sys

import pytest

from quantjax.lab.train import progress as progress_lib
from quantjax.lab.train.progress import Progress


def run():
    with Progress("psg, 2 bits", 5) as progress:
        progress.advance(2)
        progress.show(5, 0.25)


def test_without_a_terminal_short_trainings_are_quiet(capsys):
    run()
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_long_ones_print_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    with Progress("psg, 2 bits", 1000) as progress:
        for step in range(1, 1001):
            now[0] += 0.5
            progress.advance(1)
            if step % 100 == 0:
                progress.show(step, 0.25)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 16  # 500 s, a line every 30
    assert lines[0] == "psg, 2 bits: 60 of 1000 steps, about 8 min left"
    assert lines[1] == "psg, 2 bits: 120 of 1000 steps, loss 0.250, about 7 min left"
    assert lines[-1] == "psg, 2 bits: 960 of 1000 steps, loss 0.250, about 20 s left"


def test_on_a_terminal_it_shows_label_steps_and_loss(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    run()
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("psg, 2 bits", "5/5", "loss 0.250"):
        assert part in err


def test_it_stops_when_training_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("wild", 5)

    def fail():
        with progress:
            assert progress._bar.live.is_started
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert not progress._bar.live.is_started
