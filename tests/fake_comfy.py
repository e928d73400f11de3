"""A test double of the part of ComfyUI that a sampler or schedule node touches.

    import fake_comfy; fake_comfy.install()      # before the node is imported
    model = fake_comfy.toy_model("eps")          # a MODEL, as a node gets it; or "flow"
    latent = fake_comfy.run(model, sampler, sigmas, torch.zeros(2, 4, 8, 8), seed=0, cfg=7.5)

It keeps the conventions of noise, masks, guidance, callbacks and call signatures. It has no files,
prompts or devices. ``run`` is what the nodes SamplerCustom and SamplerCustomAdvanced do. The toy
network is exact for Gaussian data.
"""

import math
import sys
import types

import torch

_NONE = types.MappingProxyType({})  # arguments that are not given


def _column(sigma, x):
    """sigma as one value, or as [B,1,...] for x [B,...]."""
    return sigma.view(()) if sigma.nelement() == 1 else sigma.view(-1, *[1] * (x.ndim - 1))


class EPS:
    def calculate_input(self, sigma, noise):
        return noise / (_column(sigma, noise) ** 2 + self.sigma_data**2) ** 0.5

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * _column(sigma, model_output)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        sigma = _column(sigma, noise)
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST:  # flow models; sigma is the time t in [0, 1]
    calculate_denoised = EPS.calculate_denoised

    def calculate_input(self, sigma, noise):
        return noise

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        sigma = _column(sigma, noise)
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - _column(sigma, latent))


class ModelSamplingDiscrete(torch.nn.Module):  # of Stable Diffusion; the network receives the nearest whole step
    def __init__(self, model_config=None):
        super().__init__()
        self.sigma_data, self.num_timesteps = 1.0, 1000
        alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        self.register_buffer("sigmas", ((1 - alphas) / alphas).sqrt().float())
        self.sigma_min, self.sigma_max, self.log_sigmas = self.sigmas[0], self.sigmas[-1], self.sigmas.log()

    def timestep(self, sigma):
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(0).view(sigma.shape)

    def sigma(self, timestep):
        t = timestep.float().clamp(0, len(self.sigmas) - 1)
        return torch.lerp(self.log_sigmas[t.floor().long()], self.log_sigmas[t.ceil().long()], t.frac()).exp()


class ModelSamplingDiscreteFlow(torch.nn.Module):
    def __init__(self, model_config=None, shift=3.0):
        super().__init__()
        self.shift, self.multiplier = shift, 1000
        self.register_buffer("sigmas", self.sigma(torch.arange(1, 1001).float()))
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma):
        return sigma * self.multiplier

    def sigma(self, timestep):
        u = timestep / self.multiplier
        return self.shift * u / (1 + (self.shift - 1) * u)


class ToyNetwork(torch.nn.Module):  # exact for N(mean of the context, spread^2); calls: (batch, times, cond_or_uncond)
    def __init__(self, sampling, spread=0.5):
        super().__init__()
        self.sampling, self.spread, self.dtype, self.calls = sampling, spread, torch.float32, []

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **named):
        self.calls.append((len(x), timesteps.tolist(), transformer_options["cond_or_uncond"]))
        mean = context.float().mean((1, 2)).view(-1, *[1] * (x.ndim - 1))
        if isinstance(self.sampling, CONST):
            t = _column(timesteps / 1000, x)
            variance = (1 - t) ** 2 * self.spread**2 + t**2
            return (x - mean - (1 - t) * self.spread**2 / variance * (x - (1 - t) * mean)) / t
        sigma = _column(self.sampling.sigma(timesteps), x)
        y = x * (1 + sigma**2) ** 0.5
        return (y - mean) * sigma / (self.spread**2 + sigma**2)


class Model:  # ``patcher.model``; in a sampler function ``model.inner_model.inner_model``
    def __init__(self, sampling, network):
        self.model_sampling, self.diffusion_model = sampling, network

    def apply_model(self, x, t, c_crossattn=None, transformer_options=_NONE, **named):
        steps = self.model_sampling.timestep(t).float()
        network_input = self.model_sampling.calculate_input(t, x).to(self.diffusion_model.dtype)
        output = self.diffusion_model(
            network_input, steps, context=c_crossattn, transformer_options=transformer_options
        )
        return self.model_sampling.calculate_denoised(t, output.float(), x)

    def scale_latent_inpaint(self, sigma, noise, latent_image, **named):
        return self.model_sampling.noise_scaling(sigma.reshape(-1, *[1] * (noise.ndim - 1)), noise, latent_image)


class ModelPatcher:  # what nodes get as MODEL
    def __init__(self, model):
        self.model, self.load_device, self.model_options = model, torch.device("cpu"), {"transformer_options": {}}

    def get_model_object(self, name):  # "model_sampling", "latent_format", "diffusion_model", ...
        return getattr(self.model, name)


class CFGGuider:  # ``model.inner_model`` in a sampler function: the network with guidance
    def __init__(self, model_patcher, positive=1.0, negative=0.0, cfg=1.0):
        self.model_patcher, self.inner_model, self.cfg = model_patcher, model_patcher.model, cfg
        self.contexts = [torch.full((1, 1, 1), float(value)) for value in (negative, positive)]

    def __call__(self, x, timestep, model_options=_NONE, seed=None):
        which = [0] if math.isclose(self.cfg, 1) else [1, 0]  # 0 is the prompt; one call with the batch twice
        options = {**model_options.get("transformer_options", {}), "cond_or_uncond": which, "sigmas": timestep}
        context = torch.cat([self.contexts[1 - n].expand(len(x), -1, -1) for n in which])
        batch = torch.cat([x] * len(which)), torch.cat([timestep] * len(which))
        outputs = self.inner_model.apply_model(*batch, c_crossattn=context, transformer_options=options).chunk(
            len(which)
        )
        return outputs[0] if len(which) == 1 else outputs[0] + (outputs[1] - outputs[0]) * self.cfg


class KSamplerX0Inpaint:  # ``model`` in a sampler function
    def __init__(self, model, sigmas):
        self.inner_model, self.sigmas = model, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options=_NONE, seed=None):
        options = {"model_options": model_options, "seed": seed}
        if denoise_mask is None:
            return self.inner_model(x, sigma, **options)
        kept = {"x": x, "sigma": sigma, "noise": self.noise, "latent_image": self.latent_image}
        kept = self.inner_model.inner_model.scale_latent_inpaint(**kept)
        out = self.inner_model(x * denoise_mask + kept * (1 - denoise_mask), sigma, **options)
        return out * denoise_mask + self.latent_image * (1 - denoise_mask)


class KSAMPLER:
    def __init__(self, sampler_function, extra_options=_NONE, inpaint_options=_NONE):
        self.sampler_function, self.extra_options, self.inpaint_options = (
            sampler_function,
            extra_options,
            inpaint_options,
        )

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        extra_args["denoise_mask"] = denoise_mask
        model = KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        sampling = model_wrap.inner_model.model_sampling
        from_noise = float(sigmas[0]) > float(sampling.sigma_max) * (1 - 1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, from_noise)

        def report(state):
            return callback and callback(state["i"], state["denoised"], state["x"], len(sigmas) - 1)

        options = {"extra_args": extra_args, "callback": report, "disable": disable_pbar, **self.extra_options}
        return sampling.inverse_noise_scaling(sigmas[-1], self.sampler_function(model, x, sigmas, **options))


def toy_model(kind="eps", shift=3.0):
    flow = kind == "flow"
    bases = (ModelSamplingDiscreteFlow, CONST) if flow else (ModelSamplingDiscrete, EPS)
    sampling = type("ModelSampling", bases, {})(*[None, shift] if flow else [])
    return ModelPatcher(Model(sampling, ToyNetwork(sampling)))


def run(model, sampler, sigmas, latent_image, seed=0, cfg=1.0, denoise_mask=None, callback=None, add_noise=True):
    """denoise_mask [B,1,H,W]: 1 where the image is made, 0 where latent_image is kept."""
    if sigmas.shape[-1] == 0:
        return latent_image
    noise = torch.randn(latent_image.shape, generator=torch.manual_seed(seed)) * add_noise
    options = {"transformer_options": {**model.model_options["transformer_options"], "sample_sigmas": sigmas}}
    extra_args = {"model_options": {**model.model_options, **options}, "seed": seed}
    guider = CFGGuider(model, cfg=cfg)
    return sampler.sample(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, True).to(
        torch.float32
    )


def install():
    """Puts the modules comfy, comfy.samplers and comfy.model_sampling in place."""
    sys.modules["comfy"] = comfy = types.ModuleType("comfy")
    comfy.__path__ = []
    sampling = (EPS, CONST, ModelSamplingDiscrete, ModelSamplingDiscreteFlow)
    for name, kinds in {"samplers": (KSAMPLER, CFGGuider, KSamplerX0Inpaint), "model_sampling": sampling}.items():
        module = sys.modules[f"comfy.{name}"] = types.ModuleType(f"comfy.{name}")
        module.__dict__.update({kind.__name__: kind for kind in kinds})
        setattr(comfy, name, module)
