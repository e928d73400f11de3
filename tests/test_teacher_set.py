"""Teacher pairs: what they are, that they are computed once, and when a file is refused."""

import dataclasses

import pytest
import torch
from toy import ToyNet

from solvers import sample
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators, stream_seeds
from training.teacher import TeacherSet, TeacherSettings, file_of, identity_of, teacher_set

SETTINGS = TeacherSettings("ipndm", 9, "polynomial", 7.0, 0.002, 80.0, pairs=5, validation=3, seed=4)


def toy(digest="a"):
    net = ToyNet(torch.float32)
    net.weights_hash = digest
    return net


def test_pairs_are_what_the_solver_makes_of_the_noise(tmp_path):
    net = toy()
    found = teacher_set(net, SETTINGS, tmp_path / "set.safetensors", batch=3)
    latents = SeededGenerators(stream_seeds(4, 0, 8)).randn([3, 16, 16])
    expected = sample(net, latents, solver="ipndm", num_steps=9)
    torch.testing.assert_close(found.images, expected, rtol=1e-4, atol=1e-5)
    assert (list(found.validation), list(found.train)) == ([0, 1, 2], [3, 4, 5, 6, 7])
    noise, cond, images = found.batch([6, 1])
    assert torch.equal(noise, latents[[6, 1]]) and cond == {} and torch.equal(images, found.images[[6, 1]])
    assert not set(stream_seeds(4, 0, 8)) & set(range(50_000))  # those of sample.py


def test_images_are_not_clipped_by_the_teacher(tmp_path):
    """Dynamic thresholding, the default of dpmpp elsewhere, would leave the solution of the ODE."""
    net = toy()
    net.means *= 3  # far outside [-1, 1]
    settings = dataclasses.replace(SETTINGS, solver="dpmpp", num_steps=12)
    found = teacher_set(net, settings, tmp_path / "set.safetensors")
    latents = found.batch(range(8))[0]
    plain = sample(net, latents, solver="dpmpp", num_steps=12, thresholding=False)
    torch.testing.assert_close(found.images, plain, rtol=1e-4, atol=1e-5)
    assert (found.images - sample(net, latents, solver="dpmpp", num_steps=12)).abs().max() > 0.1


def test_computed_once(tmp_path):
    path = tmp_path / "sets" / "set.safetensors"
    first = teacher_set(toy(), SETTINGS, path, more={"amp": "none"})
    net = toy()
    again = teacher_set(net, SETTINGS, path, more={"amp": "none"})
    assert not net.calls and torch.equal(first.images, again.images)
    assert [entry.name for entry in path.parent.iterdir()] == ["set.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solver": "dpmpp"}, r"another solver \(ipndm there, dpmpp now\)"),
        ({"num_steps": 10}, r"another num_steps \(9 there, 10 now\)"),
        ({"pairs": 6}, r"another pairs \(5 there, 6 now\)"),
        ({"seed": 5}, "another seed"),
        ({"states": True}, "another states"),
    ],
)
def test_a_file_of_other_settings_is_refused(tmp_path, change, message):
    path = tmp_path / "set.safetensors"
    teacher_set(toy(), SETTINGS, path)
    before = path.read_bytes()
    other = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(UserError, match=message):
        teacher_set(toy(), other, path)
    assert path.read_bytes() == before
    assert file_of(tmp_path, identity_of(toy(), other)) != file_of(tmp_path, identity_of(toy(), SETTINGS))


def test_a_file_of_another_network_or_damaged_is_refused(tmp_path):
    path = tmp_path / "set.safetensors"
    teacher_set(toy(), SETTINGS, path)
    with pytest.raises(UserError, match=r"another network_hash \(a there, b now\)"):
        teacher_set(toy("b"), SETTINGS, path)
    with pytest.raises(UserError, match="another guidance_rate"):
        teacher_set(toy(), SETTINGS, path, more={"guidance_rate": 2.0})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    for damaged in (bytes(content), bytes(content[: len(content) // 2]), b"nonsense, and more of it"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged|not a readable"):
            teacher_set(toy(), SETTINGS, path)


def test_states_between_the_levels(tmp_path):
    """Interpolated states lie on the trajectory of the same teacher with far more steps."""
    net = toy()
    settings = dataclasses.replace(SETTINGS, num_steps=41, states=True)
    found = teacher_set(net, settings, tmp_path / "set.safetensors")
    assert found.states.shape == (12, 8, 3, 16, 16) and found.levels[0] == 80
    exact = found.states_at([2, 7], found.levels[[0, 4, 11]])
    torch.testing.assert_close(exact, found.states[[0, 4, 11]][:, [2, 7]], rtol=1e-5, atol=1e-5)
    latents = found.batch([2, 7])[0]
    fine, info = sample(net, latents, solver="ipndm", num_steps=201, return_trajectory=True, return_info=True)
    for index in (5, 60, 110, 150):
        sigma = info.sigmas[index : index + 1]
        error = (found.states_at([2, 7], sigma)[0] - fine[index]).square().mean().sqrt()
        assert error < 0.03 * (sigma**2 + 0.25).sqrt()
    assert torch.equal(teacher_set(net, settings, tmp_path / "set.safetensors").states, found.states)


def test_states_of_normal_data_are_found_exactly_between_few_levels():
    """For data N(0, 1) the trajectory is x_0 sqrt(1 + sigma^2) / sqrt(1 + sigma_0^2)."""
    levels = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.2, 0.002], dtype=torch.float64)
    start = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = torch.stack([start * ((1 + level**2) / (1 + levels[0] ** 2)).sqrt() for level in levels])
    found = TeacherSet(None, SETTINGS, states[-1], states, levels)
    wanted = torch.tensor([60.0, 9.0, 2.0, 0.5, 0.05, 0.01], dtype=torch.float64)
    expected = [start[[6, 1]] * ((1 + sigma**2) / (1 + levels[0] ** 2)).sqrt() for sigma in wanted]
    torch.testing.assert_close(found.states_at([6, 1], wanted), torch.stack(expected), rtol=1e-9, atol=1e-12)
    beyond = found.states_at([6, 1], torch.tensor([81.0, 0.0019], dtype=torch.float64))  # those of the ends
    torch.testing.assert_close(beyond, states[[0, -1]][:, [6, 1]], rtol=1e-9, atol=1e-12)


def test_what_cannot_be_a_teacher(tmp_path):
    for name in ("edm", "span", "amed", "nothing"):
        with pytest.raises(UserError, match=f"'{name}' cannot be the teacher"):
            dataclasses.replace(SETTINGS, solver=name)
    for change in ({"num_steps": 2}, {"pairs": 0}):
        with pytest.raises(UserError, match="at least"):
            dataclasses.replace(SETTINGS, **change)
    net = toy()
    net.means *= float("nan")
    with pytest.raises(UserError, match="not finite"):
        teacher_set(net, SETTINGS, tmp_path / "set.safetensors")
    assert not list(tmp_path.iterdir())
