"""The frame of every command line: joins the other processes, and ends with them whatever happens."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.signals import raised_sigterm

_OF_COLLECTIVES = re.compile(r"gloo|nccl|closed by peer|reset by peer|broken pipe|socket", re.IGNORECASE)
_PATIENCE_S = 5.0  # a broken collective may be noticed before the reason for it arrives


@contextmanager
def session(device: str | None = None) -> Iterator[torch.device]:
    """Yields the device to compute on, as a member of the process group where torchrun started us.

    An error in the block reaches all other processes, which then stop with it; an error that comes of another process's
    end is replaced by what happened there. SIGTERM raises signals.Interrupted.
    """
    with raised_sigterm():
        try:
            yield distributed.init(device)
        except Exception as error:
            if _lost_contact(error):
                if distributed.peer_failed(within=_PATIENCE_S):
                    distributed.check_peers()
                raise UserError(f"lost the connection to another process: {str(error)[:300]}") from None
            distributed.report_failure(
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            raise
        except KeyboardInterrupt as signalled:
            distributed.report_failure(str(signalled) or "Ctrl-C")
            raise
        finally:
            distributed.shutdown()


def _lost_contact(error: Exception) -> bool:
    """Whether a collective broke because of another process."""
    if isinstance(error, UserError) or distributed.world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _OF_COLLECTIVES.search(str(error)) is not None
    )
