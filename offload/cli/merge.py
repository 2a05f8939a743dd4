"""`offload merge`: an adapter folded into its model."""

from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from offload.adapters.peft import load_adapters, merge, save_model
from offload.cli.arguments.others import MergeArguments
from offload.cli.terminal import say
from offload.generation.prompts import load_tokenizer
from offload.model.checkpoint_folder import find_folder
from offload.model.quantised.gguf_files import SUFFIX
from offload.storage.errors import ConfigError


def run(request: MergeArguments) -> None:
    output = Path(request.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists already; name a new folder")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = find_folder(request.model)
    if folder.endswith(SUFFIX):
        raise ConfigError(
            f"{folder} is quantised, and what an adapter adds would be rounded away: use the adapter beside it "
            "(`offload generate --adapter`), or merge it into the plain checkpoint"
        )
    tokenizer = load_tokenizer(folder, request.trust_remote_code)
    # Views of the files: nothing is read before it is merged or saved.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=request.trust_remote_code)
    save_model(merge(load_adapters(model, request.adapter), request.disk), tokenizer, output)
    say(f"the merged model is in {output}")
