"""Nodes that load a predictor and give its SAMPLER and SIGMAS, with the package amed-solver."""

import importlib
import os
from pathlib import Path

import folder_paths
import torch

FOLDER = "predictors"  # in ComfyUI's folder of models
CATEGORY = "sampling/custom_sampling/learned"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def _of_package(name: str):
    """A module of amed-solver. Other nodes may have put a package of the same name in its place."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        top = importlib.import_module(name.split(".")[0]) if name.split(".")[0] != error.name else None
        found = f"another package is called {top.__name__} ({top.__file__})" if top else f"no module {error.name}"
        raise RuntimeError(
            f"the package amed-solver cannot be used: {found}. Install it into ComfyUI's Python: pip install amed-solver"
        ) from error
    return module


def _path(file: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(FOLDER, file))


class LoadPredictor:
    """A trained predictor or span solver from the folder models/predictors."""

    RETURN_TYPES = ("LEARNED_PREDICTOR",)
    RETURN_NAMES = ("predictor",)
    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": (folder_paths.get_filename_list(FOLDER),)}}

    @classmethod
    def IS_CHANGED(cls, file):
        state = _path(file).stat()
        return f"{state.st_size} {state.st_mtime_ns}"

    def load(self, file):
        with torch.inference_mode(False):  # else its tensors could not be moved to another device later
            return (_of_package("training.checkpoint").load_predictor(_path(file)),)


class LearnedSampler:
    """The solver of a predictor. It works with the noise levels of the node Learned Sigmas only."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "build"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"predictor": ("LEARNED_PREDICTOR",)}}

    def build(self, predictor):
        import comfy.samplers

        function = _of_package("solvers.k_sampler").sample_learned
        return (comfy.samplers.KSAMPLER(function, extra_options={"predictor": predictor}),)


class LearnedSigmas:
    """The noise levels of a predictor. With denoise below 1, the last ones, for image-to-image."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "build"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "predictor": ("LEARNED_PREDICTOR",),
                "denoise": ("FLOAT", denoise),
            }
        }

    def build(self, model, predictor, denoise):
        sampling = model.get_model_object("model_sampling")
        sigmas = _of_package("solvers.k_sampler").learned_sigmas(predictor, sampling)
        steps = round((len(sigmas) - 1) * denoise)
        return (sigmas[-steps - 1 :] if steps else torch.FloatTensor([]),)


class ExactTimes:
    """The model with fractional time steps, as in training.

    Otherwise its noise levels are rounded to whole steps.
    """

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        sampling = model.get_model_object("model_sampling")
        if not hasattr(sampling, "log_sigmas"):
            return (model,)  # flow models are not rounded

        class Fractional(type(sampling)):
            def timestep(self, sigma):
                levels = self.log_sigmas.to(sigma.device)
                level = sigma.log().to(levels)
                low = (torch.searchsorted(levels, level.contiguous()) - 1).clamp(0, len(levels) - 2)
                share = (level - levels[low]) / (levels[low + 1] - levels[low])
                return (low + share).clamp(0, len(levels) - 1).view(sigma.shape)

        exact = Fractional(getattr(model.model, "model_config", None))
        for name, value in sampling.__dict__.items():  # of tables that other nodes have changed
            if name not in ("_buffers", "_parameters", "_modules"):
                exact.__dict__[name] = value
        exact._buffers.update(sampling._buffers)
        patched = model.clone()
        patched.add_object_patch("model_sampling", exact)
        return (patched,)


NODE_CLASS_MAPPINGS = {
    "AMEDLoadPredictor": LoadPredictor,
    "AMEDLearnedSampler": LearnedSampler,
    "AMEDLearnedSigmas": LearnedSigmas,
    "AMEDExactTimes": ExactTimes,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AMEDLoadPredictor": "Load Predictor",
    "AMEDLearnedSampler": "Learned Sampler",
    "AMEDLearnedSigmas": "Learned Sigmas",
    "AMEDExactTimes": "Exact Times",
}
