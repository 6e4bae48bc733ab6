"""Tiny Shakespeare in GPT-2's tokens: 302,000 to train on, 36,000 to validate on."""

base = 'shakespeare_char'
tokenizer = 'gpt2'
