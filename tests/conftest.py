"""What several test files use: programs in this process and in others that begin warm, and a number of threads for a while."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

Run = Callable[..., tuple[int, str, str]]

# files whose tests take longest: workers begin with them, so that none is left with one at the end
LONG = ("test_launched", "test_rows_run", "test_benchmarks", "test_distributed", "test_compare")


def pytest_configure() -> None:
    """Tests that interrupt themselves mean it, also where a shell started them in the background, with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the files out as two workers take them: each a half, long ones first, and none to both for its fixtures' sake."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    by_length = sorted(files, key=lambda path: path.stem not in LONG)  # stable
    items[:] = [item for path in by_length[::2] + by_length[1::2] for item in files[path]]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Tests draw the same whatever ran before them in their worker: one seed, before any fixture."""
    torch.default_generator.manual_seed(
        0
    )  # torch.manual_seed writes down who asked, for accelerators that are not there


@pytest.fixture
def zolr(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, stdout, stderr."""
    from zolr.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed tokens of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOLR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def begun(program: str, arguments: list[str], where: Mapping[str, str], out: Path, err: Path) -> BaseProcess:
    """Start a Python program in a process that begins with its imports done, which take longer than most of what tests run.

    Args:
        program: a script, or a package with a `__main__`.
        where: what its environment has more.
        out, err: files for what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zolr.cli.warm", "zolr.training"])
    process = context.Process(target=_program, args=(program, arguments, dict(where), out, err))
    process.start()
    return process


def _program(program: str, arguments: list[str], where: dict[str, str], out: Path, err: Path) -> None:
    os.environ |= where
    sys.path[:0] = where.get("PYTHONPATH", "").split(os.pathsep)
    for number, path in ((1, out), (2, err)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
