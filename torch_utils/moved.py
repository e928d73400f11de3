"""Old import paths: moved modules can be imported, and run with ``python -m``, by former names."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

MOVED = {
    "models.clip": "evaluation.clip",
    "models.detectors": "evaluation.detectors",
    "models.diffusers_model": "models.diffusers",
    "models.edm_io": "models.edm",
    "models.execution": "models.compile",
    "models.inception": "evaluation.inception",
    "models.networks": "models.edm_unet",
    "models.verifiers": "evaluation.verifiers",
    "solvers.diffusers_scheduler": "sampling.diffusers_scheduler",
    "solvers.dmn": "solvers.search.dmn",
    "solvers.evolution": "solvers.search.evolution",
    "solvers.feature_loss": "training.sample_loss",
    "solvers.flags": "sampling.flags",
    "solvers.gits": "solvers.search.gits",
    "solvers.ld3": "training.ld3",
    "solvers.loop": "solvers.sampler",
    "solvers.noise_search": "sampling.search",
    "solvers.ofs": "solvers.search.ofs",
    "solvers.optimize": "training.schedule_search",
    "solvers.pair_loss": "training.sample_loss",
    "solvers.rules": "solvers.solver",
    "tools.comparison": "tools.compare_run",
    "tools.comparison_report": "tools.report",
    "torch_utils.doctor": "tools.doctor",
    "torch_utils.frechet": "evaluation.reading",
    "torch_utils.image_data": "torch_utils.images",
    "torch_utils.image_writer": "torch_utils.images",
    "torch_utils.manifold": "evaluation.precision_recall",
    "torch_utils.peers": "torch_utils.distributed",
    "torch_utils.signals": "torch_utils.session",
    "torch_utils.weights_file": "torch_utils.tensor_file",
    "training.config": "training.options",
    "training.distribution_loss": "training.sample_loss",
    "training.final_config": "training.options",
    "training.final_loop": "training.span_run",
    "training.inputs": "models.inputs",
    "training.teacher_set": "training.teacher",
    "training.training_loop": "training.amed_trainer",
}

# Renamed members of moved modules: current module -> former name -> current name.
RENAMED = {
    "solvers.solver": {"Rule": "Solver", "make_rule": "make_solver"},
    "training.options": {"FinalOptions": "SpanOptions", "TrainingOptions": "AMEDOptions"},
    "training.span_run": {"FinalTrainer": "SpanTrainer", "FinalRun": "SpanRun", "train_student": "train_span"},
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a former module name and returns the current module, the same object."""

    def find_spec(self, name, path=None, target=None):
        if name not in MOVED:
            return None
        return importlib.util.spec_from_loader(name, self, origin=importlib.util.find_spec(MOVED[name]).origin)

    def create_module(self, spec):
        now = MOVED[spec.name]
        warnings.warn(f"the module {spec.name} is now {now}; import it from there", DeprecationWarning, stacklevel=4)
        module = importlib.import_module(now)
        for former, name in RENAMED.get(now, {}).items():
            setattr(module, former, getattr(module, name))
        self._spec = module.__spec__  # importlib will replace it by that of the old name
        return module

    def exec_module(self, module):
        module.__spec__ = self._spec

    def get_code(self, name):
        """For ``python -m`` with a former name."""
        return importlib.util.find_spec(MOVED[name]).loader.get_code(MOVED[name])


def install() -> None:
    """Makes the former names importable. Called once, when this package is imported."""
    sys.meta_path.append(_Finder())
