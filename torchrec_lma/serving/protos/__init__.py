"""The messages of TorchRec's prediction service."""
