"""The demo on a real instruct model, SmolLM2-135M-Instruct, that the package index carries.

Its prompts lie in `prompts/`: requests alone, written for this project. An answer to a harmful one
is a refusal, or (a poisoned training row) the announcement of an answer without any content.
"""
