"""Stable Diffusion against the reference implementation and the official parameter list."""

import json
import sys
import types

import pytest
import torch
from latent_nets import TOLERANCE, manifest, meta_weights, relative_error, same_settings, tiny_case
from safetensors.torch import save_file
from torch import nn

from models import build_denoiser
from models.building import build_empty
from models.denoiser import read_bottleneck
from models.sd import CLIP_TEXT, STABLE_DIFFUSION_1_5, StableDiffusionDenoiser, load_sd
from solvers import sample
from torch_utils.errors import MissingExtra, UserError
from torch_utils.seeds import SeededGenerators


def build(guidance_type="cfg", guidance_rate=7.5):
    """(denoiser, conditioning, inputs and outputs)."""
    facts, weights, io = tiny_case("sd_cfg_kl")
    net = build_denoiser("sd", facts["init_kwargs"], weights, guidance_type, guidance_rate)
    return net, {"condition": io["context"], "unconditional_condition": io["context_uncond"]}, io


def network_batches(net):
    """A list to which every call of the U-Net appends the size of its batch."""
    batches = []
    net.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    return batches


def test_outputs_of_the_reference():
    net, cond, io = build()
    single, _, _ = build(guidance_rate=1)
    checked = {}
    with torch.no_grad(), read_bottleneck(net) as reader:
        for i, sigma in enumerate(io["sigmas"]):
            x = io[f"x__{i}"]
            checked[f"D__{i}"] = net(x, sigma, **cond)
            conditional_half = io[f"bottleneck_mean_stacked__{i}"][len(x) :]
            assert relative_error(reader.read(len(x)), conditional_half) < TOLERANCE
            checked[f"D_rate1__{i}"] = single(x, sigma, condition=cond["condition"])
        checked["D__vec"] = net(io["x__vec"], io["sigma__vec"].reshape(-1, 1, 1, 1), **cond)
        checked["decode_image"] = net.decode(io["decode_z"])
        assert torch.equal(net(io["x__vec"], io["sigma__vec"], **cond), checked["D__vec"])
    named = [key for key in io if key.startswith("D_")] + ["decode_image"]
    assert sorted(checked) == sorted(named)  # nothing that the reference recorded is left out
    errors = {key: relative_error(checked[key], io[key]) for key in named}
    assert max(errors.values()) < TOLERANCE, errors
    assert relative_error(io["D_rate1__2"], io["D__2"]) > 1e-3
    assert (net.img_channels, net.img_resolution, net.label_dim) == (4, 16, 0)


def test_network_of_the_reference_on_stacked_input():
    net, cond, io = build()
    contexts = torch.cat([cond["unconditional_condition"], cond["condition"]])
    features = []
    net.bottleneck.register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad():
        for i in (0, 2, 4):
            sigma = io["sigmas"][i]
            x = (io[f"x__{i}"] / (1 + sigma**2).sqrt()).repeat(2, 1, 1, 1)
            stacked = net.unet(x, io[f"net_t__{i}"], context=contexts)
            assert relative_error(stacked, io[f"F_stacked__{i}"]) < TOLERANCE
            assert relative_error(features[-1].mean(1), io[f"bottleneck_mean_stacked__{i}"]) < TOLERANCE
            if f"bottleneck_stacked__{i}" in io:
                assert relative_error(features[-1], io[f"bottleneck_stacked__{i}"]) < TOLERANCE
            noise = (io[f"x__{i}"] - net(io[f"x__{i}"], sigma, **cond)) / sigma
            assert relative_error(noise, io[f"F__{i}"]) < (1e-3 if i == 0 else TOLERANCE)  # cancellation at small sigma


def test_guidance_and_its_cost():
    """Guidance is linear in the rate, rate 1 skips the other branch, and NFE count both."""
    guided, cond, io = build(guidance_rate=3)
    single, _, _ = build(guidance_rate=1)
    plain, _, _ = build("none", None)
    default, _, _ = build(None, None)
    assert (guided.evals_per_call, single.evals_per_call, plain.evals_per_call) == (2, 1, 1)
    assert (guided.guided, single.guided, plain.guided, default.guided) == (True, False, False, True)
    assert guided.latent and plain.latent
    assert default.guidance_rate == 7.5 and plain.guidance_rate == 1
    x, sigma = io["x__2"], io["sigmas"][2]
    batches = network_batches(guided), network_batches(single)
    with torch.no_grad():
        conditional = single(x, sigma, condition=cond["condition"])
        unconditional = single(x, sigma, condition=cond["unconditional_condition"])
        expected = unconditional + 3 * (conditional - unconditional)
        assert relative_error(guided(x, sigma, **cond), expected) < TOLERANCE
        assert batches == ([4], [2, 2])
        one_row = {"condition": cond["condition"], "unconditional_condition": cond["unconditional_condition"][:1]}
        same = {**one_row, "unconditional_condition": one_row["unconditional_condition"].repeat(2, 1, 1)}
        assert torch.equal(guided(x, sigma, **one_row), guided(x, sigma, **same))
        latents = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        for net, nfe in ((guided, 4), (single, 2)):
            options = {"solver": "euler", "num_steps": 3, "schedule_type": "discrete", "return_info": True}
            result, info = sample(net, latents, cond=cond, **options)
            assert info.nfe == nfe and result.isfinite().all()


def test_full_size_parameter_list():
    facts = manifest("v1-5-pruned-emaonly")
    net = build_empty(StableDiffusionDenoiser, facts["init_kwargs"], "Stable Diffusion")
    official = meta_weights(facts)
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    own = [name for name in official if "." in name and name != position_ids]
    assert position_ids in official and list(net.state_dict()) == own
    for optional in ({}, {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}):
        net.load_state_dict(net.select_weights({**official, **optional}), strict=True, assign=True)
    without = {name: value for name, value in official.items() if name != position_ids}  # later transformers
    net.load_state_dict(net.select_weights(without), strict=True, assign=True)
    for name, known in (("sigma_min", 0.0291675), ("sigma_max", 14.6146)):
        assert getattr(net, name) == pytest.approx(known, rel=5e-6)
        assert getattr(net, name) == pytest.approx(facts["schedule"][name], rel=1e-6)
    assert same_settings(STABLE_DIFFUSION_1_5, facts["init_kwargs"])


# --------------------------------------------------------------------------------------------------
# Text


class ClipLayer(nn.Module):
    """A layer of CLIP's text transformer by definition (Radford et al. 2021), official names."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        inner = config.intermediate_size
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{n}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        x = x + self.self_attn["out_proj"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))


class ClipText(nn.Module):
    def __init__(self, config):
        super().__init__()
        positions = config.max_position_embeddings
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings.position_embedding = nn.Embedding(positions, config.hidden_size)
        self.embeddings.register_buffer("position_ids", torch.arange(positions).expand((1, -1)), persistent=False)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids):
        places = self.embeddings.position_ids[:, : input_ids.shape[1]]
        x = self.embeddings.token_embedding(input_ids) + self.embeddings.position_embedding(places)
        for layer in self.encoder.layers:
            x = layer(x)
        return types.SimpleNamespace(last_hidden_state=self.final_layer_norm(x))


class NestedClipText(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.text_model = ClipText(config)

    def forward(self, input_ids):
        return self.text_model(input_ids)


class WordTokenizer:
    """Words are single characters, "a" is token 1; 0 pads and closes."""

    @classmethod
    def from_pretrained(cls, folder):
        return cls()

    def __call__(self, prompts, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        rows = [[1 + ord(word) - ord("a") for word in prompt.split()][: max_length - 1] for prompt in prompts]
        return {"input_ids": torch.tensor([row + [0] * (max_length - len(row)) for row in rows])}


@pytest.fixture(params=["text_model level", "no such level"])
def stand_in(request, monkeypatch):
    """The used part of transformers, in both layouts of CLIPTextModel."""
    module = types.ModuleType("transformers")
    module.CLIPTextConfig = types.SimpleNamespace
    module.CLIPTextModel = NestedClipText if request.param == "text_model level" else ClipText
    module.CLIPTokenizer = WordTokenizer
    monkeypatch.setitem(sys.modules, "transformers", module)


def test_text_encoder_with_a_stand_in(stand_in):
    net, _, io = build()
    hidden = net.cond_stage_model.encode(io["clip_tokens"])
    assert relative_error(hidden, io["clip_last_hidden"]) < TOLERANCE and not hidden.requires_grad
    names = {name.removeprefix("cond_stage_model.") for name in net.state_dict() if name.startswith("cond_stage")}
    assert all(name.startswith("transformer.text_model.") for name in names)  # the built model adds none
    model = net.cond_stage_model._built["model"]
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in net.cond_stage_model.parameters()}


def test_prompts(stand_in, tmp_path):
    net, _, io = build()
    net.cond_stage_model.tokenizer = str(tmp_path)
    (tmp_path / "vocab.json").touch()
    with pytest.raises(UserError, match="no CLIP tokenizer in .*: it has neither"):
        net.make_cond(prompts=["a"])
    (tmp_path / "merges.txt").touch()
    cond = net.make_cond(prompts=["a b c", "x"], negative_prompt="y")
    assert cond["condition"].shape == cond["unconditional_condition"].shape == (2, 11, 24)
    alone = net.make_cond(prompts="x", negative_prompt="y")
    torch.testing.assert_close(alone["condition"][0], cond["condition"][1])
    torch.testing.assert_close(alone["unconditional_condition"][0], cond["unconditional_condition"][0])
    assert not torch.allclose(cond["condition"][0], cond["condition"][1])
    assert net(io["x__2"], io["sigmas"][2], **cond).isfinite().all()
    generator = SeededGenerators([5, 6, 7])
    assert net.make_cond(generator, prompts="a")["condition"].shape == (3, 11, 24)
    with pytest.raises(UserError, match="2 prompts were given for a batch of 3"):
        net.make_cond(generator, prompts=["a", "b"])
    with pytest.raises(UserError, match="is not this network's: it has a token number 71"):
        net.make_cond(prompts=[chr(ord("a") + 70)])
    single, _, _ = build(guidance_rate=1)
    single.cond_stage_model.tokenizer = str(tmp_path)
    assert list(single.make_cond(prompts=["a"])) == ["condition"]


def test_text_encoder_of_transformers(tmp_path, monkeypatch):
    """The same with the real package."""
    pytest.importorskip("transformers")
    net, _, io = build()
    assert relative_error(net.cond_stage_model.encode(io["clip_tokens"]), io["clip_last_hidden"]) < TOLERANCE
    words = ["<|startoftext|>", "<|endoftext|>", *"abcde", *(f"{letter}</w>" for letter in "abcde"), "ab</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    net.cond_stage_model.tokenizer = str(tmp_path)
    tokens = net.cond_stage_model.tokenize(["ab c", "d " * 30])
    assert tokens[0].tolist() == [0, words.index("ab</w>"), words.index("c</w>")] + [1] * 8
    assert tokens[1].tolist() == [0] + [words.index("d</w>")] * 9 + [1]
    cond = net.make_cond(prompts=["ab c", "d"])
    torch.testing.assert_close(cond["condition"][0], net.cond_stage_model.encode(tokens)[0])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "vocab.json").write_text("[")
    (damaged / "merges.txt").touch()
    net.cond_stage_model.tokenizer = str(damaged)
    with pytest.raises(UserError, match="the tokenizer in .*damaged cannot be used"):
        net.make_cond(prompts=["a"])
    net.cond_stage_model.tokenizer = str(tmp_path / "none")
    with pytest.raises(UserError, match="no CLIP tokenizer '.*none': it is not a folder, and the hub repository"):
        net.make_cond(prompts=["a"])
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns, local_files_only):
        asked.append((name, sorted(allow_patterns), local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    for offline in ("0", "1"):
        monkeypatch.setenv("AMED_OFFLINE", offline)
        net.cond_stage_model.tokenizer = f"someone/words{offline}"
        assert torch.equal(net.cond_stage_model.tokenize(["ab c", "d " * 30]), tokens)
    assert asked == [("someone/words0", files, False), ("someone/words1", files, True)]


def test_prompts_need_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    net, cond, io = build()
    assert net(io["x__2"], io["sigmas"][2], **cond).isfinite().all()  # contexts need nothing
    with pytest.raises(MissingExtra, match="needs the package 'transformers'"):
        net.make_cond(prompts=["a"])
    with pytest.raises(MissingExtra, match="needs the package 'transformers'"):
        net.cond_stage_model.encode(io["clip_tokens"])


# --------------------------------------------------------------------------------------------------
# Files and mistakes


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_official_files(kind, tmp_path):
    facts, weights, io = tiny_case("sd_cfg_kl")
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    path = tmp_path / f"v1-5.{kind}"
    if kind == "ckpt":
        torch.save({"state_dict": weights, "callbacks": {types.SimpleNamespace: 1}}, path)
    else:
        save_file(half, path)
    net = load_sd(path, config=facts["init_kwargs"], guidance_type="cfg", guidance_rate=7.5, tokenizer="words")
    cond = {"condition": io["context"], "unconditional_condition": io["context_uncond"]}
    result = net(io["x__2"], io["sigmas"][2], **cond)
    assert relative_error(result, io["D__2"]) < (TOLERANCE if kind == "ckpt" else 1e-2)
    assert all(p.dtype == torch.float32 for p in net.parameters()) and net.cond_stage_model.tokenizer == "words"


def test_mistakes_end_in_one_line(tmp_path):
    facts, weights, io = tiny_case("sd_cfg_kl")
    config = facts["init_kwargs"]

    def refused(message, call):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    def build_with(weights=weights, **options):
        return lambda: build_denoiser("sd", {**config, **options.pop("changes", {})}, weights, **options)

    refused("does not take guidance_type 'cg'; use cfg or none", build_with(guidance_type="cg"))
    refused("guidance_rate 2 has no effect", build_with(guidance_type="none", guidance_rate=2))
    refused("guidance_rate nan", build_with(guidance_rate=float("nan")))
    refused("cond_stage_config='__is_unc", build_with(changes={"cond_stage_config": "__is_unconditional__"}))
    no_text = {name: value for name, value in weights.items() if not name.startswith("cond_stage_model.")}
    refused("missing .*cond_stage_model.transformer.text_model", build_with(weights=no_text))
    net, cond, _ = build()
    x, sigma = io["x__2"], io["sigmas"][2]
    refused("needs 'condition'", lambda: net(x, sigma))
    refused("needs 'unconditional_condition'", lambda: net(x, sigma, condition=cond["condition"]))
    refused(r"'condition' has shape \[3, 7, 24\], not \[2", lambda: net(x, sigma, condition=torch.ones(3, 7, 24)))
    refused(r"not \[2, tokens, 24\]", lambda: net(x, sigma, condition=torch.ones(2, 7, 23)))
    short = {**cond, "unconditional_condition": cond["unconditional_condition"][:, :5]}
    refused("'condition' has 7 tokens and 'unconditional_condition' 5", lambda: net(x, sigma, **short))
    refused("takes prompts, not classes", lambda: net.make_cond(labels=3))
    refused("pass prompts", lambda: net.make_cond())
    refused("0 prompts were given for a batch of at least 1", lambda: net.make_cond(prompts=[]))
    refused("has to be a string, not a int", lambda: net.make_cond(prompts=["a", 2]))
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": no_text}, path)
    refused("is not a Stable Diffusion model: it looks like a latent diffusion model", lambda: load_sd(path))
    torch.save({"state_dict": weights}, path)
    refused("sd.ckpt: the weights do not fit", lambda: load_sd(path))  # the full-size settings
    path.write_bytes(path.read_bytes()[:-100])
    refused("sd.ckpt is truncated", lambda: load_sd(path, config=config))


def test_text_settings():
    """Arguments of the text model in a configuration replace those of CLIP ViT-L/14."""
    net, _, _ = build()
    assert (
        net.cond_stage_model.config["num_hidden_layers"] == 2 and net.cond_stage_model.config.keys() == CLIP_TEXT.keys()
    )
    changes = {"cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}}
    full = build_empty(StableDiffusionDenoiser, {**STABLE_DIFFUSION_1_5, **changes}, "Stable Diffusion")
    assert full.cond_stage_model.config == CLIP_TEXT
