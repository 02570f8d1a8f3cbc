"""What llama.cpp makes of a GGUF file. Run by test_gguf.py in an interpreter that has llama-cpp-python; needs nothing of this
project: reads a JSON list of questions on standard input, writes the logits it is asked for beside each file, answers in JSON.
"""

import json
import sys

import llama_cpp
import numpy as np


def opened(path: str) -> llama_cpp.Llama:
    f32 = 0  # the number of the type: keys and values are kept as they are, not in float16
    return llama_cpp.Llama(
        path,
        n_ctx=0,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=f32,
        type_v=f32,
        verbose=False,
        use_mmap=False,
    )


def answer(question: dict) -> dict:
    """Of one file: which of `ids`, `texts`, `special`, `greedy`, `prompt` and `messages` are asked for is answered."""
    model, path = opened(question["path"]), question["path"]
    found = {"ends": [i for i in range(model.n_vocab()) if is_end(model, i)]}
    if "ids" in question:  # several texts
        logits = []
        for ids in question["ids"]:
            model.reset()
            model.eval(ids)
            logits.append(np.array(model.scores[: len(ids)], dtype=np.float32))
        found["logits"] = f"{path}.npz"
        np.savez(found["logits"], *logits)
    for name, special in (("texts", False), ("special", True)):
        texts = [text.encode() for text in question.get(name, [])]
        found[name] = [model.tokenize(text, add_bos=False, special=special) for text in texts]
        found[f"{name}_back"] = [model.detokenize(ids, special=True).decode("utf-8", "replace") for ids in found[name]]
    if "greedy" in question:
        model.reset()
        made = []
        for token in model.generate(question["greedy"], temp=0.0, repeat_penalty=1.0):
            made.append(token)
            if len(made) == question["tokens"] or is_end(model, token):
                break
        found["greedy"] = made
    if "prompt" in question:  # text as a person gives it to llama.cpp
        model.create_completion(question["prompt"], max_tokens=1, temperature=0.0)
        found["prompt"] = model.input_ids[: model.n_tokens].tolist()[: question["prompt_tokens"]]
    if "messages" in question:
        model.reset()
        answered = model.create_chat_completion(
            question["messages"], temperature=0.0, repeat_penalty=1.0, max_tokens=question["tokens"]
        )
        found["chat"] = answered["choices"][0]["message"]["content"]
        found["finish"] = answered["choices"][0]["finish_reason"]
        found["chat_ids"] = model.input_ids[: answered["usage"]["prompt_tokens"]].tolist()
        found["template"] = model.metadata.get("tokenizer.chat_template")
    return found


def is_end(model: llama_cpp.Llama, token: int) -> bool:
    return bool(llama_cpp.llama_vocab_is_eog(model._model.vocab, token))


if __name__ == "__main__":
    print(
        json.dumps(
            {"version": llama_cpp.__version__, "answers": [answer(question) for question in json.load(sys.stdin)]}
        )
    )
