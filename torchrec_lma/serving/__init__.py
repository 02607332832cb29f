"""Serving a TorchScript model over gRPC: `server` and `client` (the `serve` extra), and the `contract` between them.

A server needs torch and fbgemm_gpu, and nothing of this library but what is in this folder.
"""
