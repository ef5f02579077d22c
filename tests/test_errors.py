from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from aiostage import errors
from aiostage.errors import (
    CheckpointMismatchError,
    RankFailedError,
    StagerClosedError,
    StagingError,
    TornSnapshotError,
    UnsupportedLeafError,
)

CLASSES = [getattr(errors, name) for name in errors.__all__]


def examples() -> list[StagingError]:
    """Return one error of every class, with everything in it that can be."""
    made: list[StagingError] = []
    for cls in CLASSES:
        if cls is StagerClosedError:
            made.append(cls())
        elif cls is TornSnapshotError:
            made.append(cls(["state_dict['a']", "state_dict['b'].c"]))
        elif cls is CheckpointMismatchError:
            made.append(cls(missing=["a"], unexpected=["b", "c"], mismatched=["d: shape (2,) and (3,)"]))
        elif cls is RankFailedError:
            made.append(cls({3: "it is broken.", 1: "it is gone."}, lost=True))
        else:
            made.append(cls("it is broken.", path="state_dict['a']", remedy="Mend it."))
    return made


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
class TestEvery:
    def test_says_what_where_and_what_to_do(self, error: StagingError) -> None:
        text = str(error)
        assert error.reason in text
        assert error.remedy is not None
        assert text.endswith(error.remedy)
        if error.path is not None:
            assert text.startswith(f"{error.path}: ")

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_survives_pickling(self, error: StagingError, protocol: int) -> None:
        error.add_note("seen on rank 3")
        self.check(error, pickle.loads(pickle.dumps(error, protocol)))

    def test_survives_copying(self, error: StagingError) -> None:
        self.check(error, copy.copy(error))
        self.check(error, copy.deepcopy(error))

    def check(self, error: StagingError, twin: Any) -> None:
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)

    def test_is_a_standard_error_too(self, error: StagingError) -> None:
        standard = [base for base in type(error).__mro__ if base.__module__ == "builtins"]
        assert isinstance(error, StagingError)
        if type(error) not in (StagingError, errors.CheckpointError):
            assert len(standard) > len(Exception.__mro__)


def fail() -> None:
    raise errors.CheckpointNotFoundError("there is none.", path="/nowhere", remedy="Look elsewhere.")


@pytest.mark.slow
def test_crosses_a_process_boundary() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        error = pool.submit(fail).exception()
    assert isinstance(error, errors.CheckpointNotFoundError)
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "/nowhere: there is none. Look elsewhere."


class Mine(TornSnapshotError):
    """A subclass of a user's, with a constructor of its own."""

    def __init__(self, step: int) -> None:
        super().__init__([f"step {step}"])
        self.step = step


def test_a_subclass_with_a_constructor_of_its_own_survives_too() -> None:
    twin = pickle.loads(pickle.dumps(Mine(3)))
    assert (twin.step, twin.paths, str(twin)) == (3, ("step 3",), str(Mine(3)))


class Foreign(Exception):
    """Another library's error, whose constructors take something else."""

    def __new__(cls, code: int, failures: dict[int, str]) -> Foreign:
        return super().__new__(cls, code, failures)

    def __init__(self, code: int, failures: dict[int, str]) -> None:
        super().__init__(code, failures)


class Both(errors.CheckpointError, Foreign):
    """One of both, as of Python 3.14 is that of ``torch.distributed.checkpoint``: Foreign's constructors come first."""

    def __new__(cls, reason: str) -> Both:
        return Exception.__new__(cls, reason)


def test_one_that_is_another_librarys_too() -> None:
    error = Both("it is broken.")
    assert Both.__mro__.index(Foreign) < Both.__mro__.index(Exception)
    assert (error.args, str(error)) == (("it is broken.",), "it is broken.")
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), twin.args, str(twin)) == (Both, error.args, str(error))


def test_long_lists_of_paths_are_counted() -> None:
    error = TornSnapshotError([f"p{number}" for number in range(25)])
    assert "p9 and 15 more" in str(error)
    assert "p10" not in str(error)
    assert len(error.paths) == 25
    assert "more" not in str(TornSnapshotError([f"p{number}" for number in range(10)]))


def test_a_mismatch_says_only_what_there_is() -> None:
    text = str(CheckpointMismatchError(missing=["a"]))
    assert "missing from the checkpoint: a" in text
    assert "unexpected" not in text
    assert "mismatched" not in text


def test_a_group_of_them_says_where_each_was() -> None:
    error = UnsupportedLeafError("it is odd.", path="state_dict['x']", remedy="Leave it out.")
    assert repr(error) == """UnsupportedLeafError("state_dict['x']: it is odd. Leave it out.")"""
    assert "state_dict['x']" in repr(ExceptionGroup("two", [error, error]))


def test_what_another_error_says_ends_without_a_full_stop() -> None:
    """Messages put their own behind it."""
    assert errors.said(ValueError("I/O operation on closed file.")) == "ValueError: I/O operation on closed file"
    assert errors.said(ValueError("x" * 400)).endswith("xxx...")
    assert errors.said(OSError(2, "No such file.")) == "FileNotFoundError(2, 'No such file.')"
