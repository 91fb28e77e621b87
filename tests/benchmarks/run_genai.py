"""One measurement of ONNX Runtime GenAI; runs in its own environment and prints [prefill, decode].

run_genai.py FOLDER THREADS PROMPT_TOKENS NEW_TOKENS
"""

import json
import sys
import time

import onnxruntime_genai as og

WARM_UP = 512  # tokens of the prompt that runs first, at most


def run(model: og.Model, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Tokens a second of the prefill, which includes choosing the first token, and of decode."""
    params = og.GeneratorParams(model)
    length = prompt_tokens + new_tokens + 1
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    started = time.perf_counter()
    generator.append_tokens([(7 * i + 11) % 49152 for i in range(prompt_tokens)])
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new_tokens):
        generator.generate_next_token()
    return prompt_tokens / (first - started), new_tokens / (time.perf_counter() - first)


def main() -> None:
    folder, (threads, prompt_tokens, new_tokens) = sys.argv[1], map(int, sys.argv[2:])
    config = og.Config(folder)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)
    run(model, min(prompt_tokens, WARM_UP), 4)
    sys.stdout.write(json.dumps(run(model, prompt_tokens, new_tokens)))


main()
