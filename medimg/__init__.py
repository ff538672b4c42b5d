"""medimg: how deep learning reads medical images, as a course whose chapters are this package. Research use, not a medical device.

The names below load on first use, so that `import medimg` costs nothing. This file is the only module written by hand.
"""
import os

# From 1.29 on ONNX Runtime reports each session to its maker, unless this stands in the environment before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_PUBLIC = {
    "scan": "data.dicom", "deidentify": "data.deidentify", "Volume": "data.volume", "Preprocessor": "data.preprocess",
    "ImageDataset": "data.datasets", "load_dataset": "data.datasets", "build_model": "models.networks", "list_models": "models.costs", "MedimgError": "errors",
    "read": "api", "train": "api", "tune": "api", "evaluate": "api", "explain": "api", "reproduce": "reproduction", "update": "api", "load_bundle": "api", "predict": "api", "report": "api",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name):
    from importlib import import_module
    if name == "__version__":
        from importlib.metadata import version
        return version("medimg")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medimg' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"medimg.{_PUBLIC[name]}"), name)
    return value


def __dir__():
    return sorted(__all__)
