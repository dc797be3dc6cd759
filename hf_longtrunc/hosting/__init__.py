"""Techniques inside hosts that load a model by themselves: servers, pipelines, harnesses."""

from hf_longtrunc.hosting.folder import Exported, export, verify_export
from hf_longtrunc.hosting.generate import Reading, hosted_generate, reading_of
from hf_longtrunc.hosting.server import serve
from hf_longtrunc.hosting.settings import HostSettings

__all__ = ["Exported", "HostSettings", "Reading", "export", "hosted_generate", "reading_of", "serve", "verify_export"]
