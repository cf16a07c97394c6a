"""One process at a time in a folder; the lock of a process that died is free, because the kernel holds it."""

import logging
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lock"


class FolderBusyError(ValueError):
    """Another process writes into the folder."""


class FolderLock:
    """An advisory lock (flock(2)) on a file in a folder, which is gone when nobody holds it.

    Where the system or the file system has no such lock, nothing is locked, and the log says so.

    Args:
        folder: that is there when the lock is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: int | None = None

    def check(self) -> None:
        """Refuse a folder that another process holds, and leave no trace.

        Raises:
            FolderBusyError: says which process.
        """
        if fcntl is None or not self.path.is_file():
            return
        file = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(file)
        finally:
            os.close(file)

    def take(self) -> None:
        """Hold the lock until `release`, or until the process dies.

        Raises:
            FolderBusyError: another process holds it; says which.
        """
        if fcntl is None:
            logger.warning("this system has no flock, so %s is not locked: start one run in it", self.path.parent)
            return
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(file)
                if self._is_in_place(file):  # and not a file that its last holder has just removed
                    self._file, file = file, -1
            finally:
                if file >= 0:
                    os.close(file)
        os.truncate(self._file, 0)
        os.write(self._file, f"{os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Let go, and remove the file."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(file, 200, 0).decode(errors="replace") or "unknown"
            raise FolderBusyError(
                f"{self.path.parent} is being written by another run (process {who}). Wait for it, or name another "
                "folder."
            ) from None
        except OSError as unsupported:
            logger.warning("%s cannot be locked (%s): start one run in it", self.path.parent, unsupported.strerror)

    def _is_in_place(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False
