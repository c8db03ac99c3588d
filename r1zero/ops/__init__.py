"""Operators that a device has fused kernels for, each behind one function."""
