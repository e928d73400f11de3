"""Former names of settings and learned parameters, still accepted in files, flags and arguments."""

from collections.abc import Mapping

FORMER_NAMES = {
    "sigmas_net": "sigmas_cond",
    # of the span solver
    "labels": "knots",
    "inner": "substeps",
    "time": "sigma_scale",
    "inner_time": "substep_sigma_scale",
    "corrections": "coef_offset",
    "scale": "step_gain",
    "contrast": "state_gain",
    "time_bound": "sigma_scale_bound",
    "scale_bound": "step_gain_bound",
    "scaled": "last_step_gains",
    "contrast_bound": "state_gain_bound",
}


def current(name):
    """The current name of ``name``, which may be current already."""
    return FORMER_NAMES.get(name, name) if isinstance(name, str) else name


def with_current_names(values: Mapping) -> dict:
    """The same values under current names."""
    return {current(name): value for name, value in values.items()}
