"""The hooks of AMEDScheduler on the network of a pipeline."""

import functools
import weakref
from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from models.denoiser import BottleneckReader, find_block_layers, shift_hooks, shifted_layers
from torch_utils.errors import UserError
from torch_utils.transfer import to_device


class _FeatureGraph:
    """A compiled network that returns its bottleneck as well, while its hook is in place.

    network: the U-Net.
    compile_like: compiles a function.
    """

    def __init__(self, network, compile_like):
        self.network, self.feature = network, None
        self.call = compile_like(self._both)

    def keep(self, module, inputs, output) -> None:
        self.feature = output

    def _both(self, *arguments, **named):
        output = self.network._call_impl(*arguments, **named)
        feature, self.feature = self.feature, None
        return output, feature


if TYPE_CHECKING:
    _Diffusers = Any  # the classes of diffusers that the scheduler gets there, an optional package
else:
    _Diffusers = object


class NetworkHooks(_Diffusers):
    """Base class of AMEDScheduler with its per-sample mode.

    The hooks see the run through attributes of the scheduler: ``_run``; ``_index``, ``_times`` and
    ``_is_now`` of the next step; ``_returned``, the latest result of ``step``; ``_prepares`` and
    ``_prepared`` of the first input. They set ``_own_call``, ``_output`` and ``_told_rate`` for it.
    """

    predictor: Any
    _network: Any
    _reader: Any
    _graph: Any
    _hooks: Any
    _finalizer: Any
    _run: Any
    _returned: Any

    def attach(self, network) -> None:
        """Per-sample mode: the predictor reads the bottleneck, and every sample gets its own times.

        A pipeline passes one time for the whole batch. A hook on the network, and on a ControlNet
        beside it, replaces it by the times of the samples; ``timesteps`` then shows their mean. The
        hook also makes AFS possible in pipelines that do not call scale_model_input. On networks
        without bottleneck (transformers) this is its only effect, and the mode stays time-only. The
        heads "time" and "blocks" of a span solver act inside the network. Hooks are on the
        network during a run only. ``detach`` ends this mode.

        network: the pipeline's U-Net or transformer.
        """
        if not isinstance(network, torch.nn.Module):
            raise UserError("AMEDScheduler: network has to be the pipeline's unet or transformer")
        self.detach()
        if self._shifts:
            self.predictor.check_network(_shifted_part(network))
        self._network = network
        if getattr(network, "mid_block", None) is not None:
            self._reader = BottleneckReader()

    def detach(self) -> None:
        """Returns to the time-only mode, from the next set_timesteps on."""
        self._unhook()
        self._network = self._reader = self._graph = self._run = None

    def _hook(self) -> None:
        """Puts the hooks on the network. They go when this scheduler goes."""
        network = self._network
        if network is None or self._hooks is not None:
            return
        other = _PREPARED.get(network, lambda: None)()
        if other is not None and other is not self and other._returned is None:
            other._unhook()  # it was prepared for a run that was not made
        _PREPARED[network] = weakref.ref(self)
        self._hooks = hooks = ExitStack()
        self._finalizer = weakref.finalize(self, hooks.close)
        compiled = _compilation(network)
        if compiled is not None:
            self._hook_compiled(hooks, *compiled)
            return
        before, after = _weak(self._before_call), _weak(self._after_call)
        hooks.callback(network.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(network.register_forward_hook(after).remove)
        if self._reader is not None:
            reader = self._reader
            keep = network.mid_block.register_forward_hook(lambda module, inputs, output: reader.keep(output))
            hooks.callback(keep.remove)
        if self._shifts:
            layers = shifted_layers(_shifted_part(network), "blocks" in self.predictor.heads)
            for handle in shift_hooks(layers, _weak(self._shift)):
                hooks.callback(handle.remove)

    def _hook_compiled(self, hooks, inner, attribute, compile_like) -> None:
        """The same for a compiled network, whose graph ignores hooks: replaces its call.

        inner: the network itself.
        attribute: of the network, where the compiled function is.
        compile_like: compiles another function in the same way.
        """
        if self._shifts:
            raise UserError("the heads 'time' and 'blocks' of a span solver do not work in a compiled network")
        network, call = self._network, getattr(self._network, attribute)
        if self._reader is not None:
            if self._graph is None:
                self._graph = _FeatureGraph(inner, compile_like)
            hooks.callback(inner.mid_block.register_forward_hook(self._graph.keep).remove)
        scheduler = weakref.ref(self)

        def around(*arguments, **named):
            own = scheduler()
            if own is None:
                return call(*arguments, **named)
            arguments, named = own._before_call(network, arguments, named) or (arguments, named)
            if own._reader is None:
                output = call(*arguments, **named)
            else:
                output, feature = own._graph.call(*arguments, **named)
                own._reader.keep(feature)
            own._after_call(network, arguments, output)
            return output

        setattr(network, attribute, around)
        hooks.callback(setattr, network, attribute, call)

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._finalizer()
        self._hooks = self._finalizer = None
        self._controlnets = False  # whether ControlNets have a hook

    @torch.no_grad()
    def _before_call(self, module, arguments, named):
        """The hook: replaces the input of the first call with AFS, and the times of later calls."""
        self._own_call, self._output = False, None
        if self._run is None or not (self._returned is None or self._reader is not None or self._shifts):
            return None
        place = "timestep" if "timestep" in named else 1
        guidance = named.get("guidance") if self._returned is None else None
        self._own_call, self._told_rate = self._is_now(named[place] if place in named else arguments[1], guidance)
        if not self._own_call:
            return None  # a call for something else
        if self._reader is not None and named.get("down_block_additional_residuals") is not None:
            self._hook_controlnets()
        if self._index == 0:
            if not self._prepares or self._prepared == "by the pipeline":
                return None
            self._prepared = "by the hook"
            place = 0 if arguments else "sample" if "sample" in named else "hidden_states"
            return _replaced(arguments, named, place, self._first_input)
        if self._reader is None:
            return None
        return self._with_times(arguments, named, place)

    def _with_times(self, arguments, named, place):
        """The arguments of a call with the times of the samples. None if its batch differs."""
        x = arguments[0] if arguments else named["sample"]
        rows, batch = len(x), len(self._times)
        if rows % batch:
            return None
        times = to_device(self._times, x.device).repeat(rows // batch)  # under guidance the batch comes twice
        return _replaced(arguments, named, place, lambda _: times)

    def _hook_controlnets(self) -> None:
        """Gives the times of the samples to ControlNets too, which are not known here.

        They are called before the U-Net. The first call of a run has one time for all samples, so
        this is early enough.
        """
        if self._controlnets:
            return
        self._controlnets = True
        kinds = _controlnet_classes()
        change = _weak(self._before_controlnet)

        def before(module, arguments):
            return change(arguments) if isinstance(module, kinds) else None

        self._hooks.callback(torch.nn.modules.module.register_module_forward_pre_hook(before).remove)

    def _before_controlnet(self, arguments):
        if self._run is None or self._reader is None or len(arguments) < 2 or not self._is_now(arguments[1])[0]:
            return None
        changed = self._with_times(arguments, {}, 1)
        return None if changed is None else changed[0]

    def _after_call(self, module, inputs, output) -> None:
        """The hook: keeps the output of the first call, which tells the guidance rate."""
        if self._own_call and self._returned is None:
            self._output = output[0] if isinstance(output, tuple) else output.sample

    @property
    def _shifts(self) -> bool:
        return getattr(self.predictor, "shift_head", None) is not None

    def _shift(self) -> torch.Tensor | None:
        """What the head "time" or "blocks" adds in this call."""
        if self._run is None or not self._own_call:
            return None
        return self.predictor.shift_head(self._index, 1).to(next(self._network.parameters()).device)


# network -> weak reference to the scheduler that hooked it last
_PREPARED: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()


def _weak(method):
    """The method as a hook that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def hook(*arguments, **named):
        own = reference()
        return None if own is None else own(*arguments, **named)

    return hook


def _compilation(network):
    """How a network was compiled, or None.

    Returns the network itself, the attribute with the compiled function, and a function that
    compiles another one in the same way.
    """
    if hasattr(network, "_orig_mod"):  # torch.compile(unet)
        return network._orig_mod, "forward", network.dynamo_ctx
    call = network._compiled_call_impl  # unet.compile()
    if call is None:
        return None
    context = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True)).get("self")
    same = getattr(context, "cell_contents", None)
    return network, "_compiled_call_impl", same if callable(same) else functools.partial(torch.compile, fullgraph=True)


@functools.cache
def _controlnet_classes() -> tuple[type, ...]:
    from diffusers.models import controlnets

    names = ("ControlNetModel", "MultiControlNetModel", "ControlNetUnionModel", "MultiControlNetUnionModel")
    return tuple(getattr(controlnets, name) for name in names if hasattr(controlnets, name))


def _replaced(arguments: tuple, named: dict, place, change) -> tuple[tuple, dict]:
    """The arguments of a call, with ``change`` applied to the one at ``place`` (number or name)."""
    if isinstance(place, int):
        return (*arguments[:place], change(arguments[place]), *arguments[place + 1 :]), named
    return arguments, {**named, place: change(named[place])}


def _shifted_part(network) -> SimpleNamespace:
    """What a span solver needs to know of a network for its head "time" or "blocks"."""
    embedding = getattr(getattr(network, "time_embedding", None), "linear_2", None)
    return SimpleNamespace(noise_embedding=embedding, block_layers=find_block_layers(network))
