"""peft/fork_tool/patches.py: the form of a patch, and applying a queue."""

import pytest
from fork_tool.patches import Patch, apply_queue, faults
from fork_tool.release import ForkError
from fork_tool.series import scratch_series

HEADER = "Add a seam\n\nThe router hangs there.\n\nUpstream: not sent yet."


def cut(old: bytes, new: bytes, *, name="0001-seam.patch", path="src/a.py") -> Patch:
    """The patch that makes `new` of `old`, as refresh cuts it."""
    with scratch_series() as series:
        series.start({path: old})
        return Patch(name, HEADER, series.diff(series.commit_files({path: new}, "x")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"a\nb\nc\n", b"a\nb\nnew\nc\n"),
        (b"a\nb\nc\n", b"first\na\nc\nlast\n"),
        (b"a\nb", b"a\nb\nc"),
        (b"a\r\nb\r\n", b"a\r\nnew\r\nb\r\n"),
        (b"a\n\x0c\nb\n", b"a\n\x0c\nnew\x0c\nb\n"),
        (b"caf\xe9\nb\n", b"caf\xe9\nth\xe9\nb\n"),
        (b"-- a\n++ b\n", b"-- c\n++ b\n"),
        (b"", b"text\n"),
    ],
)
def test_a_cut_patch_gives_back_every_byte(old, new):
    patch = cut(old, new)
    assert Patch.parse(patch.name, patch.text) == patch
    assert apply_queue({"src/a.py": old}, [patch]) == {"src/a.py": new}
    assert faults(patch) == []


def test_added_and_removed_lines_are_counted_by_hunk():
    patch = cut(b"-- a\nb\nc\n", b"++ c\n-- d\nb\nc\nd\n")
    assert (patch.added, patch.removed) == (3, 1)


def test_a_patch_holds_no_line_of_upstream_that_it_does_not_remove():
    patch = cut(
        b"def secret():\n    x\n    y\n    z\n    w\n", b"def secret():\n    x\n    y\n    z\n    new\n    w\n"
    )
    assert "secret" not in patch.diff and " z" not in patch.diff


def test_the_message_for_upstream_leaves_out_our_note():
    assert cut(b"a\n", b"b\n").message == "Add a seam\n\nThe router hangs there.\n"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"name": "seam.patch"}, "four digits"),
        ({"header": "x" * 101 + "\n\nwhy\n\nUpstream: no."}, "at most 100 characters"),
        ({"header": "Subject\n\nUpstream: no."}, "why it is needed"),
        ({"header": "Subject\nwhy\n\nUpstream: no."}, "blank line"),
        ({"header": "Subject\n\nwhy"}, "Upstream: ..."),
        ({"diff": ""}, "changes nothing"),
    ],
)
def test_a_malformed_patch_is_told_what_is_wrong(change, fault):
    good = {"name": "0001-seam.patch", "header": HEADER, "diff": cut(b"a\n", b"b\n").diff}
    assert any(fault in found for found in faults(Patch(**good | change)))


def test_context_lines_and_hunk_headings_are_faults():
    start = "diff --git a/src/a.py b/src/a.py\n--- a/src/a.py\n+++ b/src/a.py\n"
    for hunk in ("@@ -1 +1,2 @@\n a\n+b\n", "@@ -1,0 +2 @@ def theirs():\n+b\n"):
        assert any("repeats upstream's text" in fault for fault in faults(Patch("0001-a.patch", HEADER, start + hunk)))


def test_new_files_and_other_folders_are_faults():
    diff = "diff --git a/docs/x b/docs/x\nnew file mode 100644\n--- /dev/null\n+++ b/docs/x\n@@ -0,0 +1 @@\n+b\n"
    found = " ".join(faults(Patch("0001-a.patch", HEADER, diff)))
    assert "'moe' in its name" in found and "docs/x" in found


def test_a_patch_that_does_not_apply_is_named_with_file_and_line():
    patch = Patch("0003-x.patch", HEADER, "diff --git a/src/a.py b/src/a.py\n--- a/src/a.py\n+++ b/src/a.py\n")
    wrong_text = Patch(patch.name, HEADER, patch.diff + "@@ -2 +2 @@\n-other\n+new\n")
    with pytest.raises(ForkError, match=r"patches/0003-x\.patch.*src/a\.py, line 2"):
        apply_queue({"src/a.py": b"a\nb\n"}, [wrong_text])
    with pytest.raises(ForkError, match=r"patches/0003-x\.patch.*\bno\b.*src/a\.py \(line 2"):
        apply_queue({}, [wrong_text])


def test_a_patch_cut_against_another_text_is_refused_even_where_git_would_apply_it():
    patch = cut(b"a\nb\n", b"a\nnew\nb\n")
    with pytest.raises(ForkError, match=r"0001-seam\.patch.*src/a\.py, line 1"):
        apply_queue({"src/a.py": b"shifted\na\nb\n"}, [patch])


def test_a_cut_short_patch_is_called_damaged():
    patch = cut(b"a\n", b"b\nc\n")
    with pytest.raises(ForkError, match=r"0001-seam\.patch.*damaged"):
        _ = Patch(patch.name, HEADER, patch.diff.removesuffix("+c\n")).hunks


def test_without_git_the_error_says_to_install_it(monkeypatch):
    patch = cut(b"a\n", b"b\n")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ForkError, match="Install git"):
        apply_queue({"src/a.py": b"a\n"}, [patch])
