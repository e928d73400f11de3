"""What trains the options of each objective."""

from collections.abc import Callable
from pathlib import Path

from training.amed_trainer import train_predictor
from training.options import AMEDOptions, SFDOptions, SpanOptions
from training.sfd_trainer import train_sfd
from training.span_run import train_span

# Type of the options -> function (options, device, run_dir, resume, net) -> file of the result.
TRAINERS: dict[type, Callable[..., Path]] = {
    AMEDOptions: train_predictor,
    SpanOptions: train_span,
    SFDOptions: train_sfd,
}
