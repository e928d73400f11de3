"""Helpers that know nothing of diffusion: files, images, processes, command lines."""

from torch_utils.moved import install

install()
