"""The truncation samplers in the types of other engines: vLLM and SGLang. Nothing here imports transformers."""
