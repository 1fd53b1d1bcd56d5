"""Demo applications: an OpenAI-compatible gateway with a page, a terminal chat, the smallest example."""
