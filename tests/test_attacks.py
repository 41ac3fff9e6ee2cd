"""Text that attacks: judges, parsers, the training loop, the log, the terminal, tokenizers, files."""

import json
import re

import pytest

import attacks
from data import Stream
from judge import defuse, load_prompts, render
from rewrite import clean
from sources import Skips, records
from test_train import finished, run_training  # noqa: F401
from tokenizer import load_tokenizer
