"""The environment of the program, as workers are to see it.

Runs in both processes: the parent takes a snapshot, the worker makes it its own.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import process


def working_directory() -> str:
    """Give the working directory of this process, without which no worker starts.

    Raises:
        FileNotFoundError: It is gone.
    """
    try:
        return os.getcwd()  # noqa: PTH109 - no more than its name is needed
    except FileNotFoundError:
        raise FileNotFoundError(
            "the working directory of this process is gone, and without one no worker "
            "can be started; call os.chdir() with one that is there"
        ) from None


class Environment:
    """The variables, working directory and module path of a process at one moment.

    Variables hold secrets, so none is shown, by ``repr`` or in an error.

    Raises:
        FileNotFoundError: The working directory is gone.
    """

    def __init__(self) -> None:
        self._variables = dict(os.environ)
        self._directory = working_directory()
        # As multiprocessing does: the directory that the program was started in.
        start = getattr(process, "ORIGINAL_DIR", None) or self._directory
        self.path = [entry or start for entry in sys.path]

    def set_variables(self) -> None:
        """Have this process see the variables of the snapshot, and no others."""
        if os.environ == self._variables:
            return
        for name in os.environ.keys() - self._variables.keys():
            del os.environ[name]
        os.environ.update(self._variables)

    def set_directory(self) -> None:
        """Have this process work in the directory of the snapshot.

        Raises:
            OSError: It is gone, or may not be entered.
        """
        try:
            os.chdir(self._directory)
        except OSError as exc:
            raise type(exc)(
                f"{self._directory} was the working directory when the executor was "
                f"made, and a worker cannot start there ({exc.strerror}); keep the "
                "directory for as long as the executor is used"
            ) from None

    def set_path(self) -> None:
        """Have this process look for modules where the snapshot says."""
        if sys.path != self.path:
            sys.path[:] = self.path

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self._directory}>"
