"""Generate with `output_path` and print after each round which samples have finished; see test_llm.py.

python tests/inference/llm_to_be_killed.py MODEL_PATH OUTPUT_PATH NUM_PROMPTS
"""

import sys

from simpo_pipeline import LLM, SamplingParams
from simpo_pipeline.inference.generated_rows import RowStream

if __name__ == "__main__":
    model_path, output_path, num_prompts = sys.argv[1:]
    write = RowStream.write

    def write_and_print(self, rows) -> None:
        write(self, rows)
        print(*(row["global_prompt_index"] for row in rows), flush=True)

    RowStream.write = write_and_print
    llm = LLM(model_path, max_seqs=4, num_pages=64)
    llm.generate(
        [f"prompt {index}" for index in range(int(num_prompts))],
        SamplingParams(max_tokens=24, logprobs=1),
        output_path=output_path,
    )
