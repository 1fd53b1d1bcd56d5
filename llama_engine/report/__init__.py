"""One machine's result files as tables, pictures and a report. Reads JSON only: no PyTorch, no engine."""
