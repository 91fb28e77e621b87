"""One measurement of OpenVINO GenAI; runs in its own environment and prints [prefill, decode].

run_openvino.py FOLDER THREADS PROMPT_TOKENS NEW_TOKENS
"""

import json
import sys

import numpy as np
import openvino as ov
import openvino_genai

WARM_UP = 512  # tokens of the prompt that runs first, at most


def run(
    pipeline: openvino_genai.LLMPipeline, offset: int, prompt_tokens: int, new_tokens: int
) -> tuple[float, float]:
    """Tokens a second of the prefill, which includes choosing the first token, and of decode."""
    config = openvino_genai.GenerationConfig(
        max_new_tokens=new_tokens + 1, min_new_tokens=new_tokens + 1, ignore_eos=True
    )
    config.do_sample = False
    ids = np.array([[(7 * i + offset) % 49152 for i in range(prompt_tokens)]], np.int64)
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    metrics = pipeline.generate(inputs, config).perf_metrics
    if metrics.get_num_generated_tokens() != new_tokens + 1:
        raise RuntimeError(f"{metrics.get_num_generated_tokens()} tokens instead of {new_tokens}")
    return 1000 * prompt_tokens / metrics.get_ttft().mean, 1000 / metrics.get_tpot().mean


def main() -> None:
    folder, (threads, prompt_tokens, new_tokens) = sys.argv[1], map(int, sys.argv[2:])
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    # The pipeline keeps a prompt's kv_cache: the same prompt again would skip its prefill.
    run(pipeline, 12, min(prompt_tokens, WARM_UP), 4)
    sys.stdout.write("\n" + json.dumps(run(pipeline, 11, prompt_tokens, new_tokens)))


main()
