"""Prints a schedule, or the table of a span solver, as plain numbers for other programs.

    python -m tools.export --predictor_path=7 --format=k-diffusion --outfile=sampler.py
    python -m tools.export --num_steps=6 --sigma_min=0.03 --sigma_max=14.6 --format=comfyui
    python -m tools.export --schedule_path=runs/gits.json --outfile=schedule.json

Formats: json (everything), comfyui (a line for a node that takes noise levels by hand), and
k-diffusion (Python code with a sampling function; it needs torch only).
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.export")

import json
import sys
from pathlib import Path

import click

if not __package__:  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.denoiser import Denoiser
from solvers.learned import learned_run
from solvers.schedule_file import load_schedule
from solvers.schedules import SCHEDULES, get_schedule
from solvers.span_table import SpanSolver
from torch_utils.cli import PATH, Command, Number
from torch_utils.errors import UserError
from torch_utils.files import write_text
from training.checkpoint import find_predictor, load_predictor

FORMATS = ("json", "comfyui", "k-diffusion")

_FUNCTION = """\
# A span solver as plain numbers. model(x, sigma) is a denoiser of k-diffusion; x = noise * SIGMAS[0].
# An interval: x += step_gain (next sigma - sigma) sum_j coefficients[j] d_j, after x *= 1 + state_gain, with all
# directions d so far. "sigma_cond" is the noise level that the network gets; None: the first step is analytical.
import torch

SIGMAS = {sigmas}
INTERVALS = {intervals}


@torch.no_grad()
def sample_learned(model, x, sigmas=None, extra_args=None, callback=None, disable=None):
    directions = []

    def combine(coefficients):
        return sum(c * d for c, d in zip(coefficients, directions))

    def direction(x, sigma, sigma_cond):
        denoised = model(x, sigma_cond * x.new_ones(len(x)), **(extra_args or {{}}))
        return (x - denoised) / sigma, denoised

    for i, (step, next_sigma) in enumerate(zip(INTERVALS, SIGMAS[1:])):
        sigma = step["sigma"]
        if step["sigma_cond"] is None:
            directions.append(x / (1 + sigma**2) ** 0.5)
        else:
            d, denoised = direction(x, sigma, step["sigma_cond"])
            directions.append(d)
            if callback is not None:
                callback({{"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised}})
        points = [x + (point["sigma"] - sigma) * combine(point["coefficients"]) for point in step["substeps"]]
        directions += [direction(e, p["sigma"], p["sigma_cond"])[0] for e, p in zip(points, step["substeps"])]
        x = (1 + step["state_gain"]) * x + step["step_gain"] * (next_sigma - sigma) * combine(step["coefficients"])
    return x
"""

_SCHEDULE = """\
# Noise levels for a sampling function of k-diffusion.
import torch

SIGMAS = torch.tensor({sigmas})

# from k_diffusion.sampling import sample_dpmpp_2m
# x = sample_dpmpp_2m(model, noise * SIGMAS[0], SIGMAS)
"""


def describe(predictor) -> dict:
    """The numbers of a predictor: kind, sigmas, evaluations, and the table or the settings."""
    if isinstance(predictor, SpanSolver):
        return {"kind": "span", **predictor.table()}
    sigmas = _levels_of(predictor)
    return {
        "kind": "amed",
        "evaluations": predictor.evaluations(),
        "sigmas": sigmas,
        "settings": {name: value for name, value in predictor.config.items() if value is not None},
    }


def _levels_of(predictor) -> list[float]:
    missing = [name for name in ("sigma_min", "sigma_max") if predictor.config[name] is None]
    if missing and predictor.config["sigmas"] is None:
        raise UserError(
            f"the predictor leaves {' and '.join(missing)} to its network: give --sigma_min and --sigma_max of the network"
        )
    return learned_run(Denoiser(), predictor).sigmas.tolist()


def render(content: dict, kind: str) -> str:
    """The text in a format of FORMATS. Raises UserError if the numbers are not the whole solver."""
    if kind == "json":
        return json.dumps(content, indent=1) + "\n"
    if kind == "comfyui":
        return ", ".join(f"{value:.6g}" for value in [*content["sigmas"][:-1], 0.0]) + "\n"
    if content["kind"] == "amed":
        raise UserError(
            "an AMED predictor is a network, not a table: use solvers.k_sampler.sample_learned with its file"
        )
    if content["kind"] == "schedule":
        return _SCHEDULE.format(sigmas=content["sigmas"])
    if content["heads"] or content["first_step"] == "gaussian":
        what = f"the head '{content['heads'][0]}'" if content["heads"] else "a mean image in its first step"
        raise UserError(f"the table is not the whole solver, it has {what}: use solvers.k_sampler.sample_learned")
    return _FUNCTION.format(
        sigmas=content["sigmas"], intervals=json.dumps(content["intervals"]).replace("null", "None")
    )


def _to_times(content: dict) -> dict:
    """Noise levels sigma as the times t = sigma / (1 + sigma) of a flow model."""
    return {"kind": "times of a flow model", "sigmas": [value / (1 + value) for value in content["sigmas"]]}


GROUPS = {
    "What to export": "predictor_path schedule_path",
    "A new schedule": "num_steps schedule_type schedule_rho sigma_min sigma_max",
    "Output": "kind flow outfile",
}


@click.command(cls=Command, groups=GROUPS)
@click.option(
    "--predictor_path", type=PATH, metavar="N|DIR|FILE|URL", help="Predictor: number, folder, file or address"
)
@click.option("--schedule_path", type=PATH, metavar="FILE", help="Schedule file (optimize_schedule.py)")
@click.option("--num_steps", type=click.IntRange(min=2), help="Number of noise levels of a new schedule")
@click.option(
    "--schedule_type",
    type=click.Choice(tuple(SCHEDULES)),
    default="polynomial",
    show_default=True,
    help="Time schedule",
)
@click.option(
    "--schedule_rho", type=Number(min=0, min_open=True), default=7, show_default=True, help="Exponent of a new schedule"
)
@click.option("--sigma_min", type=Number(min=0, min_open=True), help="Lowest noise level")
@click.option("--sigma_max", type=Number(min=0, min_open=True), help="Highest noise level")
@click.option(
    "--format", "kind", type=click.Choice(FORMATS), default="json", show_default=True, help="Form of the output"
)
@click.option("--flow", is_flag=True, help="Times t = sigma / (1 + sigma), as flow models in ComfyUI take them")
@click.option("--outfile", type=PATH, help="File to write; default: the standard output")
def main(
    predictor_path, schedule_path, num_steps, schedule_type, schedule_rho, sigma_min, sigma_max, kind, flow, outfile
):
    """Prints a schedule, or the table of a span solver, as plain numbers."""
    given = [value for value in (predictor_path, schedule_path, num_steps) if value is not None]
    if len(given) != 1:
        raise UserError("give one of --predictor_path, --schedule_path and --num_steps")
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    if predictor_path is not None:
        predictor = load_predictor(find_predictor(predictor_path))
        if not isinstance(predictor, SpanSolver):
            for name, value in ends.items():
                if predictor.config[name] is None:
                    predictor.config[name] = value
        content = describe(predictor)
    elif schedule_path is not None:
        content = {"kind": "schedule", "sigmas": load_schedule(schedule_path).sigmas}
    else:
        if None in ends.values():
            raise UserError("a new schedule needs --sigma_min and --sigma_max")
        sigmas = get_schedule(num_steps, schedule_type=schedule_type, schedule_rho=schedule_rho, **ends)
        content = {"kind": "schedule", "sigmas": sigmas.tolist()}
    if flow and kind == "k-diffusion":
        raise UserError("--flow is for the formats json and comfyui: k-diffusion has no flow models")
    text = render(_to_times(content) if flow else content, kind)
    if outfile is None:
        click.echo(text, nl=False)
        return
    write_text(outfile, text)


if __name__ == "__main__":
    main()
