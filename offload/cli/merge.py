"""`offload merge`: an adapter folded into its model."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from offload.adapters.peft import load_adapters, merge, save_model
from offload.cli.terminal import say
from offload.generation.text import load_tokenizer
from offload.model.checkpoint_folder import find_folder
from offload.storage.errors import ConfigError

SUMMARY = "Fold an adapter into its model. Writes a folder that transformers loads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a safetensors checkpoint, a hub id, or `demo`")
    add("--adapter", required=True, metavar="DIR", help="a PEFT adapter folder, as `offload finetune` writes one")
    add("--output", required=True, metavar="DIR", help="where the model is written")
    add("--disk", metavar="DIR", help="holds merged weights meanwhile (default: the system's temporary folder)")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint (off by default)")


def run(request: argparse.Namespace) -> None:
    output = Path(request.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists already; name a new folder")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = find_folder(request.model)
    tokenizer = load_tokenizer(folder, request.trust_remote_code)
    # Views of the files: nothing is read before it is merged or saved.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=request.trust_remote_code)
    save_model(merge(load_adapters(model, request.adapter), request.disk), tokenizer, output)
    say(f"the merged model is in {output}")
