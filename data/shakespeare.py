"""Tiny Shakespeare in GPT-2's tokens: 302,000 of them to train on, 36,000 to validate."""

base = 'shakespeare_char'
tokenizer = 'gpt2'
