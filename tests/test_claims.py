"""A chapter's claims: errors where the book is made, a printed line elsewhere; tests of a reader's work stay errors."""

import pytest

pytest.importorskip("IPython")
from IPython.core.interactiveshell import InteractiveShell

from bdlib import claims


@pytest.fixture
def shell(monkeypatch):
    fresh = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: fresh)
    monkeypatch.delenv("BDLIB_STRICT", raising=False)
    return fresh


def test_a_claim_that_fails_is_told_and_the_cell_goes_on(shell, capsys):
    claims.tell()
    result = shell.run_cell("asr = 0.2\nassert asr < 0.1\nafter = 'went on'")
    assert result.success and shell.user_ns["after"] == "went on"
    assert "does not: asr < 0.1" in capsys.readouterr().out


def test_a_claim_that_holds_says_nothing(shell, capsys):
    claims.tell()
    assert shell.run_cell("assert 1 < 2").success
    assert capsys.readouterr().out == ""


def test_claims_in_loops_and_functions_are_told_too(shell, capsys):
    claims.tell()
    shell.run_cell("def f(x):\n    assert x < 2\n\nfor k in (1, 3):\n    assert k < 2")
    shell.run_cell("f(5)")
    assert capsys.readouterr().out.splitlines() == [
        "In the book's run this held, here it does not: k < 2",
        "In the book's run this held, here it does not: x < 2",
    ]


def test_an_assert_with_a_message_is_a_readers_test_and_stays_one(shell, capsys):
    claims.tell()
    result = shell.run_cell("assert 2 < 1, 'your mask has 3 entries'")
    assert isinstance(result.error_in_exec, AssertionError)


def test_an_error_inside_a_claim_is_an_error(shell, capsys):
    claims.tell()
    assert isinstance(shell.run_cell("assert nothing < 1").error_in_exec, NameError)


@pytest.mark.parametrize(("value", "strict"), [("1", True), ("0", False), ("", False)])
def test_the_book_is_made_strictly(value, strict, shell, capsys, monkeypatch):
    monkeypatch.setenv("BDLIB_STRICT", value)
    claims.tell()
    assert shell.run_cell("assert 2 < 1").success != strict


def test_telling_twice_tells_once(shell, capsys):
    claims.tell()
    claims.tell()
    shell.run_cell("assert 2 < 1")
    assert capsys.readouterr().out.count("2 < 1") == 1


def test_outside_a_notebook_nothing_happens(monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    claims.tell()
