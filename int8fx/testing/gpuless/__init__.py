"""What tests/gpuless and the GPU benchmarks share: kernels as specimens, layers, launches, bounds."""
