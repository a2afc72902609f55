"""Launchers of the native kernels, one folder per backend: they allocate outputs and workspace, and call."""
