"""Commands of `python -m simpo_pipeline.executor status|gc`, and the text that experiments print."""
