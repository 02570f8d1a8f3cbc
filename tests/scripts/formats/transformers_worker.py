"""Run by the tests in a process of its own, with one of the two transformers: what it makes of folders.

    python transformers_worker.py jobs.json

jobs.json lists {"folder", "ids", "texts", "messages", "out"}; beside `out` come out.safetensors (the logits of each row of ids) and out.json
(greedy continuations, template text and ids, ids of texts, the class). {"make": {...}, "ids", "out"} saves a random model of a class
instead, and {"code", "folder", "out"} runs a model card's code in its folder. A job that fails leaves out.error.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

torch.set_num_threads(1)
NEW_TOKENS = 50


def look(job: dict) -> None:
    folder, out = job["folder"], Path(job["out"])
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logits, greedy = {}, []
    with torch.no_grad():
        for i, row in enumerate(job["ids"]):
            ids = torch.tensor([row])
            logits[str(i)] = model(input_ids=ids).logits[0].contiguous()
            if i < job.get("greedy", 1):
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                    eos_token_id=None,
                )
                greedy.append(made[0, len(row) :].tolist())
    save_file(logits, out.with_suffix(".safetensors"))
    found = {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "loading": {key: sorted(map(str, value)) for key, value in loading.items()},
        "greedy": greedy,
        "generation": model.generation_config.to_dict(),
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]],
        "plain_ids": [tokenizer(text)["input_ids"] for text in job["texts"]],
        "back": [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in job["texts"]],
        "names": sorted(tokenizer(job["texts"][0])),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "template": [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in job["messages"]],
        "template_ids": [
            list(tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True)["input_ids"]) for m in job["messages"]
        ],
    }  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")


def make(job: dict) -> None:
    """A random model of a transformers class, saved by transformers; its logits beside it."""
    out = Path(job["out"])
    torch.manual_seed(0)
    config = getattr(transformers, job["make"]["class"] + "Config")(**job["make"]["config"])
    model = getattr(transformers, job["make"]["class"] + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            noise = torch.randn_like(tensor)
            tensor.add_(0.1 * noise) if tensor.dim() == 1 else tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        dtype = getattr(torch, job["make"].get("dtype", "float32"))
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).float())
        logits = {
            str(i): model(input_ids=torch.tensor([row])).logits[0].contiguous() for i, row in enumerate(job["ids"])
        }
        model.to(dtype).save_pretrained(out, **job["make"].get("save", {}))
    save_file(logits, out.with_suffix(".safetensors"))


def run_code(job: dict) -> None:
    os.chdir(job["folder"])
    module = Path(job["out"]).with_suffix(".py")
    module.write_text(job["code"], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(module.stem, module)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    Path(job["out"]).with_suffix(".txt").write_text(printed.getvalue(), encoding="utf-8")


for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    try:
        do = make if "make" in job else run_code if "code" in job else look
        do(job)
    except Exception as error:
        Path(job["out"]).with_suffix(".error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
