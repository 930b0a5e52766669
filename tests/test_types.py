"""The package has no type errors but those that tests/type_baseline.txt knows, and the baseline only shrinks."""

import pytest
import type_check

LINES = [
    "mqformer_jax/a.py:1:2: error[invalid-argument-type] one",
    "mqformer_jax/a.py:3:4: error[invalid-argument-type] two",
    "mqformer_jax/b.py:5:6: warning[deprecated] three",
]
COUNTS = {("mqformer_jax/a.py", "invalid-argument-type"): 2, ("mqformer_jax/b.py", "deprecated"): 1}


def test_the_package_has_no_new_type_errors():
    ty = type_check.checker()
    if ty is None:
        pytest.skip("ty is not installed: pip install -e '.[dev]'")
    made_by, _ = type_check.read(type_check.BASELINE.read_text())
    if type_check.version(ty) != made_by:
        pytest.skip(f"the baseline was made by {made_by}, this is {type_check.version(ty)}: pip install -e '.[dev]'")
    assert type_check.main([]) is None


def test_a_baseline_is_read_as_it_was_written():
    assert type_check.read(type_check.write("ty 1.2", COUNTS)) == ("ty 1.2", COUNTS)


def test_diagnostics_equal_to_the_baseline_pass():
    assert type_check.count(LINES) == COUNTS
    assert not type_check.more(LINES, COUNTS) and not type_check.fewer(LINES, COUNTS)


def test_a_new_diagnostic_is_printed_with_the_known_ones_of_its_file_and_rule():
    known = COUNTS | {("mqformer_jax/a.py", "invalid-argument-type"): 1}
    told = type_check.more(LINES, known)
    assert told[0] == "mqformer_jax/a.py: 2 of invalid-argument-type, the baseline knows 1:"
    assert [line.strip() for line in told[1:]] == LINES[:2]


def test_fixed_diagnostics_require_a_smaller_baseline():
    assert type_check.fewer(LINES[1:], COUNTS) and type_check.fewer(LINES[:2], COUNTS)


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """Runs the command with `found` as the checker's answer; the baseline holds COUNTS of version 1."""
    monkeypatch.setattr(type_check, "BASELINE", tmp_path / "baseline.txt")
    type_check.BASELINE.write_text(type_check.write("ty 1", COUNTS))

    def run(found: list[str], *arguments: str, version: str = "ty 1") -> str | None:
        monkeypatch.setattr(type_check, "checker", lambda: "ty")
        monkeypatch.setattr(type_check, "version", lambda _: version)
        monkeypatch.setattr(type_check, "diagnostics", lambda _: found)
        return type_check.main(list(arguments))

    return run


def test_update_shrinks_the_baseline(checked):
    assert checked(LINES[1:]) == type_check.SHRINK
    assert checked(LINES[1:], "--update") is None
    assert checked(LINES[1:]) is None


def test_update_grows_the_baseline_only_for_a_new_checker_version(checked):
    added = [*LINES, "mqformer_jax/c.py:1:1: error[not-callable] four"]
    assert "cannot grow" in checked(added, "--update")
    assert "the baseline was made by ty 1, this is ty 2" in checked(added, version="ty 2")
    assert checked(added, "--update", version="ty 2") is None
    assert checked(added, version="ty 2") is None
