"""The PEFT fork: builds it from the pinned release, our modules and the patch queue, and keeps the queue.

    python peft/fork.py build              lay upstream's files, patched, under peft/src
    python peft/fork.py check              exit 1 unless queue, tree, README and git agree
    python peft/fork.py refresh            take hand edits under peft/src into the queue
    python peft/fork.py rebase 0.22.0      move the queue to another release
    python peft/fork.py pr ~/src/peft      write the series onto a branch of a checkout of upstream
    python peft/fork.py verify ~/src/peft  prove that each commit of that branch stands alone
    python peft/fork.py test               run PEFT's own LoRA tests on the release and on the fork

It is also the PEP 517 build backend that `pip install ./peft` runs: each hook builds first and then leaves the rest
to setuptools.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fork_tool.check import check
from fork_tool.moves import NewPatch, drop, rebase, refresh, removed_lines, take_commits
from fork_tool.pull_request import write_pull_request
from fork_tool.release import ForkError
from fork_tool.tree import Fork, build, is_leftover, own_files, read_manifest, stray_files
from fork_tool.upstream_tests import FILES, REQUIREMENTS, compare


HERE = Fork(Path(__file__).resolve().parent)


def main(argv: list[str] | None = None, fork: Fork = HERE) -> int:
    """Run one command; returns the exit code: 0, 1 for what went wrong (one line on stderr), 2 for a wrong call."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "refresh":
        _check_refresh_options(parser, options)
    try:
        return options.run(fork, options)
    except ForkError as refused:
        print(f"fork.py: {refused}", file=sys.stderr)
        return 1


def _build(fork: Fork, options: argparse.Namespace) -> int:
    laid = build(fork)
    counts = f"{laid.written} files written, {laid.removed} removed, {laid.unchanged} unchanged"
    print(f"{fork.pin.name} {fork.pin.fork_version}: {len(fork.patches)} patches; {counts}")
    for path in stray_files(own_files(fork, read_manifest(fork).files)):
        print(f"fork.py: {path} is ours but git ignores it; put 'moe' in its name.", file=sys.stderr)
    return 0


def _check(fork: Fork, options: argparse.Namespace) -> int:
    report, wrong = check(fork)
    print("\n".join(report))
    for fault in wrong:
        print(f"fork.py: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def _refresh(fork: Fork, options: argparse.Namespace) -> int:
    if options.take:
        names = take_commits(fork, options.take, options.base)
        print(f"{len(names)} patches: {', '.join(names) or 'none'}")
        return 0
    if options.drop:
        print(f"dropped {drop(fork, options.drop).name}; removed lines: {removed_lines(fork.patches)}")
        return 0
    new = None
    if options.new:
        new = NewPatch(slug=options.new, subject=options.subject, why=options.why, upstream=options.upstream)
    edited = refresh(fork, into=options.patch, new=new)
    print(f"edits taken from: {', '.join(edited) or 'no file'}; removed lines: {removed_lines(fork.patches)}")
    return 0


def _rebase(fork: Fork, options: argparse.Namespace) -> int:
    pin, dropped = rebase(fork, options.version)
    for name in dropped:
        print(f"dropped {name}: {pin.version} has that change")
    print(f"{pin.name} {pin.fork_version}: {len(fork.patches)} patches; sha256 {pin.sha256}")
    return 0


def _pr(fork: Fork, options: argparse.Namespace) -> int:
    for subject in write_pull_request(fork, options.checkout, options.branch):
        print(subject)
    return 0


def _verify(fork: Fork, options: argparse.Namespace) -> int:
    from fork_tool.verify import Verdict, verify  # not for the build hooks, which have no use for it

    def told(verdict: Verdict) -> None:
        print(f"{'FAILS' if verdict.wrong else 'stands'}  {verdict.subject}: {verdict.counts}", flush=True)
        for fault in verdict.wrong:
            print(f"    {fault}", flush=True)

    verdicts = verify(fork, options.checkout, tests=options.tests, workers=options.workers, told=told)
    return 1 if any(verdict.wrong for verdict in verdicts) else 0


def _test(fork: Fork, options: argparse.Namespace) -> int:
    if options.requirements:
        print(" ".join(REQUIREMENTS))
        return 0
    output = options.output or fork.state / "upstream-tests"
    text, same = compare(fork, output, files=options.select, workers=options.workers, again=options.again)
    print(f"{text}\nwritten to {output}: summary.txt, pristine.xml, fork.xml")
    return 0 if same else 1


def _parser() -> argparse.ArgumentParser:
    about, calls = __doc__.split("\n\n")[:2]
    one_line = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=160)
    parser = argparse.ArgumentParser(
        prog="fork.py", description=about, epilog=f"examples:\n{calls}", formatter_class=one_line
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help_: str) -> argparse.ArgumentParser:
        call = next(line.strip() for line in calls.splitlines() if f"fork.py {name}" in line)
        example, _, _ = call.partition("  ")  # behind it stands what it does
        added = commands.add_parser(
            name, help=help_, description=help_, epilog=f"example: {example}", formatter_class=one_line
        )
        added.set_defaults(run=run)
        return added

    command("build", _build, "Lay upstream's files, with the patches applied, under src/; hand edits are refused.")
    command("check", _check, "Exit 1 unless the queue, the built tree, README.md and what git tracks agree.")
    taking = command("refresh", _refresh, "Take hand edits of generated files into the patches and cut them afresh.")
    where = taking.add_mutually_exclusive_group()
    where.add_argument(
        "--patch", metavar="NAME", help="let this patch take the edits; default: the last that touches a file"
    )
    where.add_argument("--new", metavar="SLUG", help="make a new patch NNNN-SLUG.patch of the edits, at the end")
    where.add_argument("--from", dest="take", type=Path, metavar="CHECKOUT", help="make the queue of commits instead")
    where.add_argument("--drop", metavar="NAME", help="take a patch out of the queue instead")
    taking.add_argument("--base", metavar="REV", help="with --from: the commit that holds the pinned release")
    taking.add_argument("--subject", help="with --new: first line of the header")
    taking.add_argument("--why", help="with --new: why the patch is needed")
    taking.add_argument(
        "--upstream", default="not sent yet.", help="with --new: sent where, or why not (default: %(default)s)"
    )
    moving = command(
        "rebase", _rebase, "Move the queue to another release by a three-way merge; on conflict change nothing."
    )
    moving.add_argument("version", metavar="VERSION", help="version of upstream, such as 0.22.0")
    sending = command("pr", _pr, "Write the series as commits onto a new branch of a clean checkout of upstream.")
    sending.add_argument("checkout", type=Path, metavar="CHECKOUT", help="top folder of the checkout")
    sending.add_argument("--branch", default="moe-lora", help="the branch to make (default: %(default)s)")
    proving = command(
        "verify", _verify, "Prove that each commit of the branch that pr wrote stands alone: style, imports, tests."
    )
    proving.add_argument("checkout", type=Path, metavar="CHECKOUT", help="top folder of the checkout, on that branch")
    proving.add_argument(
        "--tests", choices=("none", "own", "all"), default="all", help="tests to run: none, ours, or also upstream's"
    )
    proving.add_argument("--workers", type=int, default=2, help="processes that run tests (default: %(default)s)")
    testing = command(
        "test", _test, "Run PEFT's own LoRA tests on the pristine release and on the fork; the same tests must pass."
    )
    testing.add_argument("--workers", type=int, default=2, help="processes of a side (default: %(default)s)")
    testing.add_argument("--output", type=Path, help="folder of the reports; by default .fork/upstream-tests")
    testing.add_argument("--again", action="store_true", help="run the pristine side even when its report is kept")
    testing.add_argument(
        "--select",
        nargs="+",
        default=FILES,
        choices=FILES,
        metavar="FILE",
        help="only these test files; by default all of LoRA's",
    )
    testing.add_argument("--requirements", action="store_true", help="print the packages the tests need, and stop")
    return parser


def _check_refresh_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.new and not (options.subject and options.why):
        parser.error("--new needs --subject and --why, the header of the patch")
    if not options.new and (options.subject or options.why):
        parser.error("--subject and --why belong to --new")
    if bool(options.take) != bool(options.base):
        parser.error("--from and --base belong together")


# The PEP 517 and PEP 660 hooks, which pip calls in the folder of this file.


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return []


get_requires_for_build_sdist = get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    wheel_directory = os.path.abspath(wheel_directory)
    with _setuptools(in_a_copy=True) as backend:
        return backend.build_wheel(wheel_directory, config_settings, None)


def build_sdist(sdist_directory, config_settings=None) -> str:
    sdist_directory = os.path.abspath(sdist_directory)
    with _setuptools(in_a_copy=True) as backend:
        return backend.build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    metadata_directory = os.path.abspath(metadata_directory)
    with _setuptools(in_a_copy=True) as backend:
        return backend.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    wheel_directory = os.path.abspath(wheel_directory)
    with _setuptools(in_a_copy=False) as backend:
        return backend.build_editable(wheel_directory, config_settings, None)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None) -> str:
    metadata_directory = os.path.abspath(metadata_directory)
    with _setuptools(in_a_copy=False) as backend:
        return backend.prepare_metadata_for_build_editable(metadata_directory, config_settings)


@contextmanager
def _setuptools(*, in_a_copy: bool) -> Iterator:
    """setuptools' own backend, working on the built tree.

    Args:
        in_a_copy: work in a copy, so that no build/ folder of an earlier build leaks a deleted module into a wheel. An
            editable install must name the real src/ and works in place.
    """
    from setuptools import build_meta

    try:
        build(HERE)
    except ForkError as refused:
        raise SystemExit(f"peft fork: {refused}") from None

    def left_behind(folder: str, names: list[str]) -> list[str]:
        if Path(folder) == HERE.root:
            return ["build", "dist"]
        return [name for name in names if is_leftover(name)]

    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="peft-fork-") as scratch:
        folder = HERE.root
        if in_a_copy:
            folder = Path(shutil.copytree(HERE.root, Path(scratch, "peft"), ignore=left_behind))
        try:
            os.chdir(folder)
            yield build_meta
        finally:
            os.chdir(before)


if __name__ == "__main__":
    sys.exit(main())
