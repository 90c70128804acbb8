"""LLM gateway: OpenAI's API in front of Ollama and vLLM."""

__version__ = "0.1.0"
