"""`homespun server`: the commands that there are."""

from __future__ import annotations

import homespun


def test_every_command_says_what_it_does(capsys):
    assert homespun.main(["server", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "evidence" in shown
