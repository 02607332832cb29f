"""TorchX components that launch the jobs of torchrec_lma. See ``lma.py``."""
