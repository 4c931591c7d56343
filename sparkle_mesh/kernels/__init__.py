"""Kernels as data: traced, checked, differentiated, fused, and run on any device."""
