"""Test Triton kernels and Inductor's CUDA output on a machine without a GPU.

See README.md in this folder. Nothing in here knows what is being tested.
"""
