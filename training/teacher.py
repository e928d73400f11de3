"""The teacher pairs of the trajectory objective: noise and image, computed once and stored."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models.denoiser import member
from models.inputs import draw_inputs
from solvers.sampler import sample
from solvers.solver import SOLVERS, check_teacher
from torch_utils import distributed
from torch_utils.distributed import on_main, together
from torch_utils.errors import UserError
from torch_utils.memory import explained_oom
from torch_utils.progress import progress_bar
from torch_utils.seeds import stream_seeds
from torch_utils.tensor_file import json_entry, read_safetensors, write_safetensors
from torch_utils.transfer import to_device

FORMAT = "teacher-set"
LEVELS = 12  # noise levels at which states are stored


@dataclass(frozen=True)
class TeacherSettings:
    """What a set of pairs depends on, besides the network.

    solver, num_steps, schedule_type, schedule_rho, sigma_min, sigma_max: of the teacher.
    pairs, validation: number of samples for training and for validation, which come first.
    seed: of the stream of samples.
    states: also store the states at ``LEVELS`` noise levels. Default False.
    """

    solver: str
    num_steps: int
    schedule_type: str
    schedule_rho: float
    sigma_min: float
    sigma_max: float
    pairs: int
    validation: int
    seed: int
    states: bool = False

    def __post_init__(self):
        check_teacher(self.solver, per_step=False)
        if self.num_steps < 3:
            raise UserError(f"num_steps_tea={self.num_steps}: a teacher needs at least 3 time steps")
        for name in ("pairs", "validation"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def count(self) -> int:
        return self.pairs + self.validation


class TeacherSet:
    """The teacher pairs.

    net, settings: the network, and what the set depends on.
    images: [validation + pairs, C, H, W].
    states: [K, validation + pairs, C, H, W] at ``levels``. Default None.
    levels: descending noise levels [K]. Default None.
    prompts: texts for text-to-image networks. Default None.
    device: of the batches. Default CPU.

    ``train`` and ``validation`` are the indices of the two parts.
    """

    def __init__(self, net, settings: TeacherSettings, images, states=None, levels=None, prompts=None, device="cpu"):
        self.net, self.settings, self.prompts, self.device = net, settings, prompts, torch.device(device)
        self.images, self.states, self.levels = images, states, levels
        self.validation = range(settings.validation)
        self.train = range(settings.validation, settings.count)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, dict, torch.Tensor]:
        """(noise [B,C,H,W], condition, images [B,C,H,W]) of these samples, on the device."""
        latents, cond = draw_inputs(self.net, _seeds(self.settings, indices), self.prompts, device=self.device)
        return latents, cond, to_device(self.images[list(indices)], self.device)

    def states_at(self, indices: Sequence[int], sigmas: torch.Tensor) -> torch.Tensor:
        """The teacher's states [len(sigmas), B, C, H, W] at these noise levels.

        indices: of the samples.
        sigmas: noise levels; clipped to the stored range.

        x / sqrt(1 + sigma^2) is interpolated by the cubic through the four nearest levels in ln
        sigma.
        """
        levels = self.levels.double()
        grid, wanted = levels.log(), sigmas.detach().double().cpu().clamp(levels[-1], levels[0])
        right = torch.searchsorted(-grid, -wanted.log()).clamp(2, len(grid) - 2)
        rows = right[:, None] + torch.arange(-2, 2)
        nodes, points = grid[rows], wanted.log()
        weights = torch.ones_like(nodes)
        for k in range(4):
            for other in range(4):
                if other != k:
                    weights[:, k] *= (points - nodes[:, other]) / (nodes[:, k] - nodes[:, other])
        weights = weights * ((1 + wanted**2).sqrt()[:, None] / (1 + levels[rows] ** 2).sqrt())
        columns = torch.as_tensor(list(indices))
        picked = [
            sum(float(w) * self.states[int(row)][columns] for w, row in zip(weights[k], rows[k], strict=True))
            for k in range(len(wanted))
        ]
        return to_device(torch.stack(picked), self.device)


def _seeds(settings: TeacherSettings, indices: Sequence[int]) -> list[int]:
    return [stream_seeds(settings.seed, int(index), 1)[0] for index in indices]


def identity_of(net, settings: TeacherSettings, more: dict | None = None) -> dict:
    """What a file must agree with: settings, network, ``more`` (guidance, precision, prompts)."""
    return {**asdict(settings), "network_hash": member(net, "weights_hash"), **(more or {})}


def file_of(folder: str | Path, identity: dict) -> Path:
    """The file of the set with this identity in a folder."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"teacher-{key}.safetensors"


def teacher_set(
    net, settings: TeacherSettings, path, *, more=None, prompts=None, batch: int = 64, device="cpu", log=None
) -> TeacherSet:
    """The set with these settings: read from ``path``, or else computed and written to it.

    net, settings: the network, and what the set depends on.
    path: the file.
    more: further entries of the identity, JSON values. Default None.
    prompts: texts for text-to-image networks. Default None.
    batch: samples per network call. Default 64.
    device: where to compute. Default CPU.
    log: function that receives progress messages. Default None.

    Every process of a torchrun computes a share, and all get the whole set. Raises UserError if the
    file belongs to other settings or is damaged, and if an image is not finite.
    """
    identity, path = identity_of(net, settings, more), Path(path)
    found = on_main(_read, path, identity)
    if found is None:
        if log is not None:
            log(f"computing {settings.count} pairs: {settings.solver}, {settings.num_steps} time steps")
        found = _compute(net, settings, prompts, batch, device)
        digest = _digest(found)
        metadata = {"format": FORMAT, "identity": json.dumps(identity), "digest": digest}
        on_main(write_safetensors, path, found, metadata)
    if log is not None:
        log(f"teacher pairs: {path}")
    return TeacherSet(net, settings, found["images"], found.get("states"), found.get("levels"), prompts, device)


def _compute(net, settings: TeacherSettings, prompts, batch: int, device) -> dict[str, torch.Tensor]:
    """Images, states and levels of all samples, on the CPU of every process."""
    rank, world = distributed.rank(), distributed.world_size()
    starts = range(0, settings.count, batch)
    mine: dict[int, tuple] = {}
    rows = torch.linspace(0, settings.num_steps - 1, min(LEVELS, settings.num_steps)).round().long()
    levels, options = None, {}
    if "thresholding" in SOLVERS[settings.solver].options:
        options["thresholding"] = False  # it does not solve the ODE
    with (
        together(),
        explained_oom(device, f"lower --batch-gpu (now {batch})"),
        progress_bar(len(starts[rank::world]), unit="batch", desc="teacher", leave=False) as bar,
    ):
        for start in starts[rank::world]:
            indices = range(start, min(start + batch, settings.count))
            latents, cond = draw_inputs(net, _seeds(settings, indices), prompts, device=device)
            states, info = sample(
                net,
                latents,
                solver=settings.solver,
                num_steps=settings.num_steps,
                schedule_type=settings.schedule_type,
                schedule_rho=settings.schedule_rho,
                sigma_min=settings.sigma_min,
                sigma_max=settings.sigma_max,
                cond=cond,
                return_trajectory=True,
                return_info=True,
                **options,
            )
            if not states[-1].isfinite().all():
                raise UserError(
                    f"the teacher {settings.solver} makes images that are not finite: choose another --sampler_tea"
                )
            if settings.states and len(states) != settings.num_steps:
                raise UserError(f"the teacher {settings.solver} skips time steps: choose another, or --w_anchor=0")
            levels = info.sigmas.cpu()
            mine[start] = (states[-1].float().cpu(), states[rows].float().cpu() if settings.states else None)
            bar.update()
    parts: dict[int, tuple] = {}
    for part in distributed.gather_objects(mine):
        parts |= part
    found = {"images": torch.cat([parts[start][0] for start in starts])}
    if settings.states:
        levels = distributed.broadcast_object(levels)
        found["states"] = torch.cat([parts[start][1] for start in starts], dim=1)
        found["levels"] = levels[rows].double()
    return found


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, identity: dict) -> dict[str, torch.Tensor] | None:
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    tensors, metadata = read_safetensors(data, str(path))
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a set of teacher pairs: choose another --teacher_set")
    there = json_entry(metadata, "identity", str(path))
    wanted = json.loads(json.dumps(identity))
    if there != wanted:
        name = next(n for n in (*wanted, *there) if there.get(n) != wanted.get(n))
        raise UserError(
            f"{path} holds teacher pairs with another {name} ({there.get(name)} there, {wanted.get(name)} now): choose "
            "another --teacher_set, or delete it"
        )
    if metadata.get("digest") != _digest(tensors):
        raise UserError(f"{path} is damaged: delete it to compute the teacher pairs again")
    return tensors
