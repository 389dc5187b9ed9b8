"""Run by a test in a process of its own: answers questions offline and prints them with their scores as JSON."""

import json
import sys

from vllm import SamplingParams

from gnuq_serve.vllm import UncertaintyLLM


def main(model: str, scorer_weights: str, calibration: str, questions: list[str]) -> None:
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8}
    llm = UncertaintyLLM(model, scorer_weights=scorer_weights, calibration=calibration, **engine)
    chats = [[{"role": "user", "content": question}] for question in questions]
    greedy = SamplingParams(temperature=0, max_tokens=24)
    outputs = llm.chat(chats, greedy, use_tqdm=False)
    rows = [
        {
            "text": output.outputs[0].text,
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs_restored": output.outputs[0].logprobs is None,
            "uncertainty": output.outputs[0].uncertainty.to_dict(),
        }
        for output in outputs
    ]
    two = llm.generate(
        "The capital of France is", SamplingParams(n=2, max_tokens=4, seed=1, logprobs=1), use_tqdm=False
    )
    rows.append([[c.uncertainty.log_probability, c.cumulative_logprob] for c in two[0].outputs])
    rows.append([list(c.uncertainty.warnings) for c in two[0].outputs])
    print("RESULT " + json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
