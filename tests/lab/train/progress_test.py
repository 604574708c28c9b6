import sys

import pytest

from quantjax.lab.train.progress import Progress


def run():
    with Progress("psg, 2 bits", 5) as progress:
        progress.advance(2)
        progress.show(5, 0.25)


def test_it_is_quiet_where_there_is_no_terminal(capsys):
    run()
    assert capsys.readouterr() == ("", "")


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
